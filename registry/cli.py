"""The command line. Every verb prints one line (or one table) for people, `--json` for programs.

Exit status: 0 done, 1 refused (the message says why and what to do), 2 the words make no sense.
It finds systems through the table and imports training and services only inside the verb that needs them.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from registry.errors import ConfigError, Invalid, NotFound, PatchbayError, unsecret
from registry.home import home
from registry.systems import SYSTEMS, system
from registry.verbs import bring, decide, doctor, records, trust, up, work
from registry.verbs.readme import readme_table
from registry.verbs.said import Says

__all__ = ["VERBS", "main", "parser", "readme_table"]

DTYPES = ("fp32", "bf16", "fp16")
"""what a base's weights may be held in"""
VERBS: dict[str, Callable[[argparse.Namespace], Says]] = {
    "systems": work.systems,
    "fit": work.fit,
    "eval": work.evaluate,
    "gate": decide.gate,
    "push": records.push,
    "pull": records.pull,
    "list": records.listing,
    "show": records.show,
    "compare": records.compare,
    "split": decide.split,
    "report": decide.report,
    "promote": decide.promote,
    "rollback": decide.rollback,
    "sign": trust.sign,
    "verify": trust.verify,
    "audit": trust.audit,
    "serve": work.serve,
    "ui": records.ui,
    "up": up.up,
    "doctor": doctor.doctor,
    "build": work.build,
    "bench": work.bench,
    "export": work.export,
    "import": bring.bring,
}
"""the whole command line; a test holds it to this set"""


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Verbs and their words. words: what was typed, for a help that depends on it."""
    out = argparse.ArgumentParser(prog="patchbay", description="Patch, register, serve and A/B models.")
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {}
    for name, verb in VERBS.items():
        made[name] = verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        made[name].add_argument("--json", action="store_true", help="answer for programs")
    ref: Any = {"metavar": "REF", "help": "system, system@challenger, system@3, sha256:digest, or a sealed folder"}
    made["systems"].add_argument("--write-readme", action="store_true", help="write README's table")
    made["fit"].add_argument("recipe", metavar="SYSTEM[/RECIPE]", help="without a recipe: the system's usual one")
    made["fit"].formatter_class = argparse.RawDescriptionHelpFormatter
    if words[:1] == ["fit"] and {"-h", "--help"} & set(words):
        named = [w.partition("/")[0] for w in words if w.partition("/")[0] in SYSTEMS]
        made["fit"].epilog = importlib.import_module("registry.recipes").listed(named[0] if named else "")
    made["push"].add_argument("folder", type=Path, help="a sealed folder, or the name of one in the home's runs/")
    for name in ("eval", "gate", "pull", "show", "promote", "build", "export", "sign", "verify"):
        made[name].add_argument("ref", **ref)
    for name in ("fit", "eval"):
        made[name].add_argument("words", nargs="*", metavar="key=value", help="settings to change")
    for name in ("push", "split", "promote"):
        made[name].add_argument("--force", metavar="REASON", help="do it all the same; the ledger keeps the reason")
    made["split"].add_argument("system")
    # argparse cannot tell an optional word from the ones after it, so `split` sorts them itself
    made["split"].add_argument(
        "words", nargs="+", metavar="[REF] SHARE [key=value]",
        help="what to try (the challenger); 0.1 for 10 %%, more ramps, 0 stops; settings of the experiment",
    )  # fmt: skip
    for name in ("eval", "gate"):
        made[name].add_argument("--device", help="default: where it was fitted")
    made["gate"].add_argument("--again", action="store_true", help="measure it anew, whatever the store has")
    made["eval"].add_argument("--full", action="store_true", help="the whole report: controls, baselines, tables")
    made["list"].add_argument("system", nargs="?")
    made["report"].add_argument("--html", type=Path, metavar="FILE", help="also as one page that needs nothing else")
    made["report"].add_argument("--ask", action="append", metavar="TEXT", help="shown there as both arms answer it")
    made["report"].add_argument("--url", default="http://127.0.0.1:3000", help="the service that is asked")
    made["report"].add_argument("--judge", metavar="URL", help="OpenAI-compatible model that scores shadow pairs first")
    made["report"].add_argument("--judge-model", default="default", metavar="NAME")
    made["sign"].add_argument("--key", type=Path, metavar="FILE", help="PEM file of an elliptic-curve private key")
    made["sign"].add_argument("--sigstore", action="store_true", help="sign with this environment's identity instead")
    made["verify"].add_argument(
        "--signer", metavar="FILE", help="public key or sigstore:WHO@ISSUER; several with commas"
    )
    made["bench"].add_argument("ref", nargs="?", **ref)
    made["bench"].add_argument("--all", action="store_true", help="the page of numbers: docs/NUMBERS.md")
    made["audit"].add_argument("system", nargs="?")
    made["audit"].add_argument("--all", action="store_true", help="challengers and gates, too")
    made["compare"].add_argument("a", **ref)
    made["compare"].add_argument("b", **ref)
    for name in ("report", "rollback", "serve"):
        made[name].add_argument("system")
    made["serve"].add_argument("--host", default="127.0.0.1")
    made["serve"].add_argument("--port", type=int, default=3000)
    for flag, text in {
        "base": "reference of the base (several with commas); default: what the patch names",
        "device": "cpu, cuda, cuda:1, ...; default: cpu",
        "dtype": "fp32, bf16 or fp16 for its weights; default: fp32 on a CPU, bf16 on a GPU",
        "workers": "processes with a copy of the base each, on GPUs one each; default: 1",
        "provider": "ONNX Runtime instead of torch: cpu or cuda",
        "slots": "rows of one batch; default: 32",
        "context": "tokens of a row, prompt and answer; default: 4096",
        "tokens": "file of callers' tokens; without it this machine alone may call",
    }.items():
        made["serve"].add_argument(f"--{flag}", help=text, choices=DTYPES if flag == "dtype" else None)
    made["up"].add_argument("systems", nargs="+", metavar="SYSTEM")
    made["up"].add_argument("--host", default="127.0.0.1")
    made["up"].add_argument("--port", type=int, default=8080)
    made["up"].add_argument("--replicas", type=int, default=1, help="processes per system; default: 1")
    made["ui"].add_argument("--host", default="127.0.0.1")
    made["ui"].add_argument("--port", type=int, default=5000)
    made["import"].add_argument("place", type=Path, metavar="FOLDER")
    made["import"].add_argument("words", nargs="*", metavar="key=value", help="base=REF, amount=1, family=llm")
    made["export"].add_argument("--as", dest="layout", choices=("checkpoint", "others", "card"), default="checkpoint",
                                help="others: what other libraries read; card: its model card")  # fmt: skip
    for name in ("build", "export", "import"):
        made[name].add_argument("--out", type=Path, default=None)
    made["build"].add_argument("--hashes", action="store_true", help="also requirements with the index's hashes")
    made["build"].add_argument("--image", help="what the Kubernetes manifests call the container image")
    return out


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The words of a command; settings may stand behind flags, too (`eval REF --full seed=1`)."""
    reader = parser(words)
    args, rest = reader.parse_known_args(words)
    # argparse gives `nargs="*"` nothing as soon as a flag follows what stands before it
    if rest and ("words" not in args or any(w.startswith("-") or "=" not in w for w in rest)):
        reader.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status. Without words: those of the process, which then ends."""
    if words is None:
        # libraries make a million objects that last; looking for garbage among them, time and again and once more at
        # the end, is a quarter of a small fit
        gc.set_threshold(10_000, 50)
        atexit.register(gc.freeze)
    args = parsed(list(words if words is not None else sys.argv[1:]))
    if "system" in args and args.system and args.verb != "list":
        try:
            system(args.system)
        except NotFound as e:
            return _refused(e, 2)
    try:
        said = VERBS[args.verb](args)
    except (ConfigError, Invalid) as e:
        return _refused(e, 2)
    except PatchbayError as e:
        return _refused(e, 1)
    except (OSError, sqlite3.Error) as e:
        return _refused(f"This machine refuses it: {e}. Look at the disk and at who may write there.", 1)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        return _refused(_fault(e), 1)
    try:
        print(json.dumps(said, default=str) if args.json else said.text, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough (`| head`), and what was to be done is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return said.status


def _fault(e: Exception) -> str:
    """What nobody foresaw, in one line; where it happened is kept in a file, for whoever mends it."""
    import traceback

    what = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:300]}"
    try:
        file = home() / "fault.txt"
        file.write_text(unsecret("".join(traceback.format_exception(e))))
    except OSError:
        return f"patchbay has a fault ({what})."
    return f"patchbay has a fault ({what}). Where it happened is in {file}; please report it."


def _refused(why: object, status: int) -> int:
    print(unsecret(str(why)), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
