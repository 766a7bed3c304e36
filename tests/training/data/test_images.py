"""The real data sets' layouts, each made here as its authors lay it out; and pictures that are not what they seem."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from registry.errors import Invalid, NotFound, TooLarge
from training.data import images

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(file, colour, size=(40, 30), **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


def colours(batch):
    """The channel that is brightest in the middle of each picture."""
    return batch.image[:, :, 8, 8].argmax(1).tolist()


def test_folders_of_classes_are_read_with_their_names(tmp_path):
    for name, colour in (("n1", RED), ("n2", BLUE)):
        for i in range(3):
            save(tmp_path / "val" / name / f"{name}_{i}.JPEG", colour)
    data = images.imagenet(tmp_path, "val", size=16, names={"n1": "red thing"})
    batch = data.read(range(6))
    assert data.classes == ("red thing", "n2")
    assert batch.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert colours(batch) == [0, 0, 0, 2, 2, 2]
    assert batch.image.shape == (6, 3, 16, 16)
    assert batch.image.dtype == torch.uint8


def test_batches_are_all_pictures_once_in_order(tmp_path):
    for i in range(7):
        save(tmp_path / ("a" if i < 4 else "b") / f"{i}.png", RED)
    data = images.imagenet(tmp_path, size=8)
    parts = list(data.batches(3))
    assert [len(p) for p in parts] == [3, 3, 1]
    assert torch.cat([p.label for p in parts]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert len(data) == 7
    with pytest.raises(NotFound, match="0 to 6"):
        data.read([7])


def celeba(folder):
    names = ["Blond_Hair", "Male", "Smiling"]
    rows = [("000001.jpg", "1 -1 1", 0, RED), ("000002.jpg", "-1 1 -1", 0, GREEN), ("000003.jpg", "1 1 -1", 2, BLUE)]
    for name, _, _, colour in rows:
        save(folder / "img_align_celeba" / name, colour, (178, 218))
    lines = [str(len(rows)), " ".join(names) + " ", *(f"{n} {' '.join(v.split())}" for n, v, _, _ in rows)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, _, p, _ in rows))


def test_celeba_gives_attributes_and_groups_of_its_own_split(tmp_path):
    celeba(tmp_path)
    train, test = images.celeba(tmp_path, "train", size=16), images.celeba(tmp_path, "test", size=16)
    batch = train.read([0, 1])
    assert train.classes == ("not blond hair", "blond hair")
    assert batch.label.tolist() == [1, 0]
    assert batch.extras["group"].tolist() == [2, 1]
    assert batch.extras["attributes"].tolist() == [[True, False, True], [False, True, False]]
    assert colours(batch) == [0, 1]
    assert colours(test.read([0])) == [2]
    assert test.read([0]).extras["group"].tolist() == [3]
    with pytest.raises(NotFound, match="Hat"):
        images.celeba(tmp_path, "test", target="Hat")
    with pytest.raises(NotFound, match="no picture"):
        images.celeba(tmp_path, "val")


def test_a_short_celeba_row_is_named(tmp_path):
    celeba(tmp_path)
    file = tmp_path / "list_attr_celeba.txt"
    file.write_text(file.read_text().replace("000002.jpg -1 1 -1", "000002.jpg -1 1"))
    with pytest.raises(Invalid, match=r"000002.jpg.*2 values, not 3"):
        images.celeba(tmp_path, "train")


def waterbirds(folder, rows):
    with (folder / "metadata.csv").open("w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        out.writerows(rows)


def test_waterbirds_gives_bird_and_place(tmp_path):
    rows = [
        (1, "001.Albatross/a.jpg", 1, 0, 1, "/o/ocean/1.jpg"),
        (2, "002.Crow/b.jpg", 0, 2, 0, "/b/bamboo_forest/1.jpg"),
        (3, "002.Crow/c.jpg", 0, 2, 1, "/l/lake/2.jpg"),
    ]
    waterbirds(tmp_path, rows)
    for row, colour in zip(rows, (RED, GREEN, BLUE), strict=True):
        save(tmp_path / row[1], colour)
    batch = images.waterbirds(tmp_path, "test", size=16).read([1, 0])
    assert batch.label.tolist() == [0, 0]
    assert batch.extras["place"].tolist() == [1, 0]
    assert batch.extras["group"].tolist() == [1, 0]
    assert colours(batch) == [2, 1]
    assert images.waterbirds(tmp_path, "train", size=16).read([0]).extras["group"].tolist() == [3]


def test_metadata_may_not_lead_out_of_the_folder(tmp_path):
    save(tmp_path / "secret.png", RED)
    inner = tmp_path / "set"
    inner.mkdir()
    waterbirds(inner, [(1, "../secret.png", 1, 2, 1, "x")])
    with pytest.raises(Invalid, match="leads out"):
        images.waterbirds(inner, "test")


def test_a_csv_without_its_columns_says_which_it_needs(tmp_path):
    (tmp_path / "metadata.csv").write_text("img_filename,y,split\na.jpg,1,2\n")
    with pytest.raises(Invalid, match="place"):
        images.waterbirds(tmp_path, "test")


def test_file_names_of_rta_and_paint_are_read(tmp_path):
    save(tmp_path / "label=cup_text=iPod.png", RED)
    save(tmp_path / "sub" / "label=hot dog_text=cup.jpg", BLUE)
    data = images.rta(tmp_path, size=16)
    batch = data.read([0, 1])
    assert data.classes == ("cup", "hot dog", "iPod")
    assert [data.classes[i] for i in batch.label] == ["cup", "hot dog"]
    assert batch.extras["word"] == ("iPod", "cup")
    assert [data.classes[i] for i in batch.extras["word_label"]] == ["iPod", "cup"]
    with pytest.raises(Invalid, match="only the split test"):
        images.rta(tmp_path, "train")
    save(tmp_path / "holiday.png", RED)
    with pytest.raises(Invalid, match=r"holiday.png is not called"):
        images.rta(tmp_path)


def test_disentangling_reads_its_annotations(tmp_path):
    about = {
        "IMG_1.JPG": {"true object": "cup", "typographic attack label": "good"},
        "IMG_2.JPG": {"true object": "good", "typographic attack label": ""},
    }
    (tmp_path / "annotations.json").write_text(json.dumps(about))
    for name, colour in zip(about, (RED, BLUE), strict=True):
        save(tmp_path / name, colour, format="JPEG")
    data = images.disentangling(tmp_path, size=16)
    batch = data.read([0, 1])
    assert data.classes == ("cup", "good")
    assert batch.label.tolist() == [0, 1]
    assert batch.extras["word"] == ("good", "")
    assert batch.extras["word_label"].tolist() == [1, -1]
    (tmp_path / "annotations.json").write_text('{"IMG_1.JPG": {"label": "cup"}}')
    with pytest.raises(Invalid, match="true object"):
        images.disentangling(tmp_path)


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(out, "PNG")
    return out.getvalue()


def test_scam_is_read_from_its_parquet_files_by_variant(tmp_path):
    rows = [
        {"image": {"bytes": png(c), "path": f"{v}_img_{i:04}.png"}, "type": v, "object_label": o, "attack_word": w,
         "postit_area_pct": 1.5, "id": f"{v}_img_{i:04}"}
        for v, c in (("SCAM", RED), ("NoSCAM", GREEN), ("SynthSCAM", BLUE))
        for i, (o, w) in enumerate((("ball", "car"), ("chair", "ball"), ("pan", "hair")))
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2])
        pq.write_table(table, tmp_path / "data" / f"train-{part:05}-of-00002.parquet", row_group_size=2)
    for variant, channel in (("SCAM", 0), ("NoSCAM", 1), ("SynthSCAM", 2)):
        data = images.scam(tmp_path, size=16, variant=variant)
        batch = data.read(range(3))
        assert colours(batch) == [channel] * 3
        pairs = {
            (data.classes[y], data.classes[w]) for y, w in zip(batch.label, batch.extras["word_label"], strict=True)
        }
        assert pairs == {("ball", "car"), ("chair", "ball"), ("pan", "hair")}
        assert all(i.startswith(f"{variant}_") for i in batch.extras["id"])
    with pytest.raises(NotFound, match="Variants"):
        images.scam(tmp_path, variant="Spam")


def test_the_digest_follows_files_and_choices(tmp_path):
    save(tmp_path / "a" / "1.png", RED)
    save(tmp_path / "b" / "1.png", BLUE)
    first = images.imagenet(tmp_path, size=16).digest
    assert images.imagenet(tmp_path, size=16).digest == first
    assert images.imagenet(tmp_path, size=32).digest != first
    save(tmp_path / "b" / "2.png", BLUE)
    assert images.imagenet(tmp_path, size=16).digest != first


def test_the_middle_is_cut_and_the_shorter_edge_fits(tmp_path):
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(Image.new("RGB", (100, 100), GREEN), (100, 0))
    wide.save(tmp_path / "w.png")
    cut = images._uint8(images.picture(tmp_path / "w.png"), 50)
    assert cut.shape == (3, 50, 50)
    assert (cut[1, 5:-5, 5:-5] > 250).all()
    assert (cut[0, 5:-5, 5:-5] < 5).all()


def test_cropping_agrees_with_open_clip(tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    noise = torch.randint(256, (61, 97, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "n.png")
    cfg = PreprocessCfg(size=32, mean=(0.0,) * 3, std=(1.0,) * 3)
    theirs = image_transform_v2(cfg, is_train=False)(Image.open(tmp_path / "n.png"))
    ours = images._uint8(images.picture(tmp_path / "n.png"), 32)
    assert torch.equal(ours.float() / 255, theirs)


def test_exif_cmyk_palette_and_transparency_become_upright_rgb(tmp_path):
    half = Image.new("RGB", (40, 20), RED)
    half.paste(Image.new("RGB", (20, 20), BLUE), (20, 0))  # red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = images.picture(tmp_path / "turned.jpg")
    assert turned.getpixel((5, 10))[2] > 200
    Image.new("CMYK", (20, 20), (255, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert images.picture(tmp_path / "print.jpg").getpixel((5, 5))[0] < 60
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.picture(tmp_path / "clear.png").getpixel((5, 5)) == (255, 255, 255)
    half.convert("P").save(tmp_path / "few.gif")
    assert images.picture(tmp_path / "few.gif").getpixel((5, 10))[0] > 200


def test_a_phones_second_picture_is_no_animation_and_deep_grey_keeps_its_range(tmp_path):
    Image.new("RGB", (40, 20), RED).save(tmp_path / "phone.jpg", "MPO", save_all=True,
                                         append_images=[Image.new("RGB", (20, 10), BLUE)])  # fmt: skip
    assert images.picture(tmp_path / "phone.jpg").getpixel((5, 5))[0] > 200
    Image.new("I;16", (20, 20), 257 * 100).save(tmp_path / "deep.png")
    assert images.picture(tmp_path / "deep.png").getpixel((5, 5)) == (100, 100, 100)
    Image.new("RGB", (20, 20), RED).save(tmp_path / "new.avif", quality=95)
    assert images.picture(tmp_path / "new.avif").getpixel((5, 5))[0] > 200


def test_broken_pictures_are_refused_by_name(tmp_path):
    save(tmp_path / "cut.jpg", RED, (300, 300))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    with pytest.raises(Invalid, match=r"cut.jpg.*get the file again"):
        images.picture(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Invalid, match=r"text.png is no picture"):
        images.picture(tmp_path / "text.png")
    frames = [Image.new("RGB", (20, 20), c) for c in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(Invalid, match=r"moving.gif is animated \(2 frames\)"):
        images.picture(tmp_path / "moving.gif")
    save(tmp_path / "dot.png", RED, (1, 1))
    with pytest.raises(Invalid, match=r"dot.png is 1 x 1"):
        images.picture(tmp_path / "dot.png")
    Image.new("F", (20, 20), 0.5).save(tmp_path / "deep.tiff")
    with pytest.raises(Invalid, match=r"deep.tiff stores its pixels as F"):
        images.picture(tmp_path / "deep.tiff")
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    with pytest.raises(TooLarge, match=r"bomb.png has 9000 x 8000"):
        images.picture(tmp_path / "bomb.png")
    with pytest.raises(NotFound, match=r"nowhere.png"):
        images.picture(tmp_path / "nowhere.png")


def test_a_missing_folder_or_list_says_what_to_put_where(tmp_path):
    with pytest.raises(NotFound, match="There is no folder"):
        images.imagenet(tmp_path / "nothing")
    with pytest.raises(NotFound, match=r"list_attr_celeba.txt"):
        images.celeba(tmp_path)
    with pytest.raises(NotFound, match=r"annotations.json"):
        images.disentangling(tmp_path)
    with pytest.raises(NotFound, match="parquet"):
        images.scam(tmp_path)
    celeba(tmp_path)
    with pytest.raises(Invalid, match="train, val, test"):
        images.celeba(tmp_path, "trian")


def _drawn(folder, n=3):
    """Pictures with a white square on black, and its mask."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    squares = []
    for i in range(n):
        pixels = np.zeros((60, 90, 3), np.uint8)
        pixels[10 : 30 + i, 40:60] = 255
        squares.append(pixels)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(pixels[..., 0]).save(folder / "masks" / f"{i}.png")
    return squares


def test_imagenet_seg_masks_are_cut_as_their_pictures(tmp_path):
    _drawn(tmp_path)
    data = images.READERS["imagenet_seg"](tmp_path, "test", 32)
    batch = data.read(range(3))
    assert batch.extras["mask"].shape == (3, 32, 32)
    assert ((batch.image[:, 0] > 127) == batch.extras["mask"]).all()
    assert batch.extras["mask"].any((1, 2)).all()
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(NotFound, match="mask of a picture"):
        images.READERS["imagenet_seg"](tmp_path)
    with pytest.raises(Invalid, match="only the split test"):
        images.READERS["imagenet_seg"](tmp_path, "val")
    with pytest.raises(NotFound, match="neither"):
        images.READERS["imagenet_seg"](tmp_path / "masks")


def test_the_published_imagenet_seg_file_is_read(tmp_path):
    h5py = pytest.importorskip("h5py", reason="optional: pip install h5py reads gtsegs_ijcv.mat")
    squares = _drawn(tmp_path / "drawn")
    with h5py.File(tmp_path / "gtsegs_ijcv.mat", "w") as f:
        for name in ("img", "gt"):
            f.create_dataset(f"value/{name}", (3, 1), h5py.ref_dtype)
        for i, pixels in enumerate(squares):
            f[f"i{i}"] = pixels.transpose(2, 1, 0)
            f[f"m{i}"] = (pixels[..., 0] > 0).astype(np.uint8).transpose(1, 0)
            cell = f.create_dataset(f"c{i}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = f[f"m{i}"].ref
            f["value/img"][i, 0], f["value/gt"][i, 0] = f[f"i{i}"].ref, cell.ref
    one = images.READERS["imagenet_seg"](tmp_path, size=32).read([2, 0])
    two = images.READERS["imagenet_seg"](tmp_path / "drawn", size=32).read([2, 0])
    assert (one.image == two.image).all()
    assert (one.extras["mask"] == two.extras["mask"]).all()
