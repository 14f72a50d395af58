"""Images: a source lists them, a cache holds them decoded, a split says which are held out.

`sources` (where from), `tree` (which files of a folder), `decode` (bytes to pixels), `cache` (pixels on disk), `split`
(rules, and the record that a run keeps), `dataset` (what training reads).
"""

from .dataset import Dataset, load
from .split import ChangedDataError, Split, compare

__all__ = ["ChangedDataError", "Dataset", "Split", "compare", "load"]
