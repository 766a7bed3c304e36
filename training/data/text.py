"""Texts and words as inputs for language models, without downloads.

Texts come from three sources: paragraphs written for this project, the Python reference pages that every CPython ships,
and source code of its standard library. Words are sampled from the model's own vocabulary by one rule, so that none is
hand-picked.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from typing import Any

from torch import Tensor, tensor

SOURCES = ("prose", "reference", "code")
_MODULES = ("textwrap", "heapq", "bisect", "fractions", "statistics", "colorsys", "calendar", "shlex")


def documents(source: str, tokenizer: Any, count: int, length: int, skip: int = 0) -> list[Tensor]:
    """Tokenise `count` texts of a source into int64 tensors of at most `length` tokens, with BOS if there is one.

    source: one of SOURCES; prose has about 60 tokens per paragraph, the others are cut to `length`. skip: number of the
    source's first texts to leave out, so that fit and test share none.
    """
    bos = tokenizer.bos_token_id
    out = []
    for text in _texts(source)[skip:]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1]
        out.append(tensor([bos, *ids] if bos is not None else ids))
        if len(out) == count:
            break
    return out


def _texts(source: str) -> list[str]:
    """Return the texts of a source: the paragraphs, or consecutive pieces of 4,500 characters."""
    if source == "prose":
        return PARAGRAPHS
    if source == "reference":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        whole = " ".join(re.sub(r"\s+", " ", topics[k]) for k in sorted(topics))
    else:
        whole = "\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)
    return [whole[i : i + 4500] for i in range(0, len(whole) - 4500, 4500)]


def words(tokenizer: Any, count: int, seed: int, avoid: set[int] = frozenset()) -> list[int]:  # type: ignore[assignment]
    """Sample the token ids of `count` words: single tokens with a leading space, three or more letters a-z.

    They must occur as whole words in the sources (fragments such as " diagn" make the model complete the word) and not
    be in `avoid`. A tokenizer with fewer such tokens gives single letters.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    real = {w for source in SOURCES for t in _texts(source) for w in re.findall(r"(?<![\w.])[a-z]{3,}(?![\w(=])", t)}
    known = [
        i
        for i, piece in enumerate(pieces)
        if re.fullmatch("[\u0120\u2581][a-z]{3,}", piece or "") and piece[1:] in real and i not in avoid
    ]
    if len(known) < count:  # a character-level tokenizer has no words: use letters
        known = [i for i, piece in enumerate(pieces) if re.fullmatch("[a-z]", piece or "") and i not in avoid]
    return random.Random(seed).sample(known, min(count, len(known)))


PARAGRAPHS = [
    "The market opens before sunrise, when the fishermen bring their crates up the narrow stairs from the harbour. By seven o'clock the stalls are full of silver mackerel, crab and long strings of mussels, and the first customers argue about prices while gulls wait on the roofs for scraps.",
    "When a kettle is placed on a hot stove, heat flows from the burner into the metal and then into the water. Bubbles form at the bottom first because that layer is warmest. Once the vapour pressure equals the pressure of the air above, the water boils steadily at a nearly constant temperature.",
    "Maria had promised herself that she would finish the report before lunch, but the phone kept ringing. Her manager wanted numbers for the regional meeting, a supplier had lost an invoice, and somebody in accounting insisted that the printer on the third floor was broken again.",
    "The library was built in 1911 with money from a local brewer who never learned to read well. He asked only that the main room should have tall windows, so that nobody would need to pay for candles. A century later students still fight over the tables nearest the glass.",
    "To repair a flat bicycle tyre, remove the wheel, lever one side of the tyre off the rim and pull out the inner tube. Pump a little air into it and listen for the leak. Roughen the rubber around the hole, apply glue, wait until it is dull, and press the patch firmly in place.",
    "Most birds that breed in the far north leave before the first storms. They follow coastlines and river valleys, resting in marshes where insects are still active. Young birds often travel without their parents, guided by an inherited sense of direction and by the position of the stars.",
    "In the second half the home team changed its formation and began to press higher. Two quick goals followed, the first from a corner and the second after a careless pass near the halfway line. The visitors protested that the striker had been offside, but the referee did not change his mind.",
    "A good soup begins with patience. Onions, carrots and celery should cook slowly in butter until they are soft and sweet. Only then add the stock, a bay leaf and a few peppercorns. Let it simmer for an hour, skim the surface, and season it at the end rather than at the beginning.",
    "The committee reviewed four proposals for the new bridge. The cheapest design used precast concrete and could be finished in fourteen months. The most elegant one was a slender steel arch, but the engineers worried about maintenance costs and the effect of salt water on the joints.",
    "My grandmother kept her letters in a biscuit tin under the bed. After she died we read them together at the kitchen table. Most were about ordinary things: the weather, a new coat, the price of coal. Yet between the lines we could see how much she had missed her brothers during the war.",
    "Photosynthesis takes place in the chloroplasts of plant cells. Light energy splits water molecules, releasing oxygen and producing the carriers that drive the rest of the process. Carbon dioxide is then fixed into sugars, which the plant can burn for energy or store as starch for the winter.",
    "The train was delayed for forty minutes outside a small station whose name I never learned. Nobody announced the reason. An old man across the aisle peeled an orange and offered pieces to the children, and by the time we moved again the whole carriage smelled of citrus.",
    "If you rent a flat in this city, you should expect to pay a deposit equal to two months of rent. The landlord must keep it in a protected account and return it within thirty days after you leave, minus the cost of any damage that goes beyond normal wear.",
    "Software projects rarely fail because of one dramatic mistake. More often they drift: a deadline is missed, a test is skipped, a workaround becomes permanent. After a year the team spends most of its time explaining old decisions to new colleagues instead of writing new code.",
    "The doctor explained that the fracture was clean and would heal without an operation. The boy would have to wear a cast for six weeks and avoid football until the spring. He accepted the news bravely, though he asked three times whether his friends would be allowed to draw on the plaster.",
    "Volcanic soil is unusually fertile because the ash contains minerals that plants need. This is why people return to the slopes of active mountains even after terrible eruptions. Vineyards, orchards and vegetable gardens climb as high as the weather allows, and villages stand where lava flowed a few generations ago.",
    "The museum's new exhibition traces the history of maps from clay tablets to satellites. One room is devoted to errors: phantom islands, rivers that flow uphill, and a lake that existed only because a clerk spilled ink. Visitors tend to spend more time there than anywhere else.",
    "Interest on the loan is calculated daily and added to the balance at the end of each month. If you make a payment early, the interest for the following period will be lower. There is no penalty for repaying the full amount before the end of the agreed term.",
    "She tuned the violin carefully, turning the pegs by tiny amounts and listening with her eyes closed. The hall was cold and the strings kept slipping. Behind the curtain the conductor tapped his watch, but she would not be hurried, and when she finally played the first note it was exactly right.",
    "Rain fell on the valley for nine days. On the tenth morning the river came over the lower meadow and reached the fence behind the school. The farmers moved their cattle to the hill, the fire brigade filled sandbags, and the baker gave away bread because the road to town was closed.",
    "Glass is neither a crystal nor an ordinary liquid. Its atoms are arranged without long range order, yet they are locked in place at room temperature. When it is heated it does not melt at one sharp point but softens gradually, which is what allows a craftsman to blow and shape it.",
    "The lecture on medieval trade was better than I had expected. The speaker argued that wool, not gold, paid for most of the cathedrals in the region. She showed us account books in which a single bad summer, with too much rain and too many sick sheep, delayed a tower by a decade.",
    "Please check the following before you call for service: make sure that the plug is firmly in the socket, that the water supply is open, and that the door is fully closed. If the red light continues to flash, write down the number shown on the display and contact your dealer.",
    "Children learn the rules of conversation long before they can explain them. They know when to wait, when to interrupt, and how to tell from a tone of voice that a question is not really a question. These skills grow quickly between the ages of two and five, mostly through play.",
    "The desert is coldest just before dawn. The guides woke us at four, handed out tea in metal cups and loaded the camels by the light of a single lamp. Within an hour the horizon turned grey and then pink, and the sand that had frozen our fingers began to give back its warmth.",
    "A jury does not have to decide what really happened. It has to decide whether the evidence removes every reasonable doubt. That difference sounds small, but it shapes the whole trial, from the questions that lawyers are allowed to ask to the instructions that the judge reads at the end.",
    "Our neighbour keeps bees on the roof of the garage. In May the swarm sometimes settles in the cherry tree, and the children watch from the window while he climbs the ladder in his white suit. He says that bees are calm when they have no home to defend, and so far nobody has been stung.",
    "The price of coffee depends on weather, politics and fashion. A frost in one country can double the cost within a week, while a good harvest elsewhere brings it down again. Small farmers rarely profit from these swings, because they must sell soon after picking and cannot wait for a better offer.",
    "Before you paint a wooden window, scrape away the loose flakes and sand the edges until they are smooth. Fill small cracks with putty and let it dry overnight. Use a primer on any bare wood, and apply two thin coats rather than one thick coat, which would run and wrinkle.",
    "At the end of the film the lighthouse keeper rows out to the wreck alone. We never learn whether he finds anyone. The camera stays on the empty kitchen, on the two cups and the open newspaper, until the light in the window changes from gold to blue and the music stops.",
]
"""Paragraphs of about 60 words each, written for this project"""
