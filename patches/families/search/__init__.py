"""Search: a generator proposes texts, a scorer decides (MILS, arXiv 2501.18096). Arms are configurations.

Its own models are CLAPs, the scorers of sounds; CLIPs and language models come from their families, by role.
"""

from patches.families.family import Family
from patches.families.search.bank import Bank
from patches.families.search.config import Budget, SearchConfig
from patches.families.search.loop import Item, Searcher
from patches.families.search.predict import predict
from patches.families.search.sound import load, tiny
from patches.families.search.table import TABLE
from patches.families.search.worker import Searching, SearchWorker

__all__ = ["FAMILY", "Bank", "Budget", "Item", "SearchConfig", "SearchWorker", "Searcher", "Searching"]

FAMILY = Family(
    name="search",
    load=load,
    tiny=tiny,
    worker=SearchWorker,
    table=TABLE,
    predict=predict,
    example="hf-hub:laion/clap-htsat-unfused",
)
