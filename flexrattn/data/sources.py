"""From the options a user gives to the two corpora of a source."""

from dataclasses import dataclass
from functools import lru_cache

from flexrattn.data.corpus import Corpus, Index, Splits, pair_indices, split_index
from flexrattn.data.local_text import local_text_files
from flexrattn.data.python_source import python_source_files
from flexrattn.data.tokens import TokenizedCorpus, open_tokens

DATASETS = ("python_source", "local", "tokens")
SPLITS = ("train", "validation")
SPLIT_BY = ("file", "top_directory", "package")


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What is read and how it is split; the fields are those of `TextDataLoader.Config`."""

    dataset: str = "python_source"
    dataset_path: str | None = None
    validation_path: str | None = None
    site_packages: bool = False
    validation_fraction: float = 0.05
    split_by: str = "file"
    suffixes: tuple[str, ...] = (".txt", ".jsonl")
    text_field: str = "text"
    max_document_bytes: int = 65536

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}")
        if self.split_by not in SPLIT_BY:
            raise ValueError(f"split_by must be one of {', '.join(SPLIT_BY)}, got {self.split_by!r}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        if self.max_document_bytes < 64:
            raise ValueError(f"max_document_bytes must be at least 64, got {self.max_document_bytes}")
        if not self.suffixes or "" in self.suffixes:
            raise ValueError(f"suffixes must name at least one ending such as .txt, got {list(self.suffixes)}")
        if self.dataset == "local" and not self.dataset_path:
            raise ValueError("dataset 'local' needs dataset_path: a .txt or .jsonl file, or a folder of them")
        if self.dataset == "tokens" and (not self.dataset_path or self.validation_path):
            raise ValueError(
                "dataset 'tokens' needs dataset_path, a folder that python -m flexrattn.data.prepare wrote, and no "
                "validation_path: that folder holds both splits"
            )
        if self.dataset == "python_source" and (self.dataset_path or self.validation_path):
            raise ValueError(
                "dataset 'python_source' takes no dataset_path and no validation_path: use dataset 'local'"
            )

    def documents(self, split: str) -> Corpus | TokenizedCorpus:
        """The documents of one split, as text or, of the dataset `tokens`, as ids."""
        if self.dataset != "tokens":
            return self.corpus(split)
        assert self.dataset_path is not None
        tokens = open_tokens(self.dataset_path, _known(split))
        if not len(tokens):
            raise ValueError(f"{self.dataset_path} has no documents in the split {split!r}: prepare more text")
        return tokens

    def corpus(self, split: str) -> Corpus:
        """The documents of one split as text. ValueError, with what would do, when there are none."""
        _known(split)
        splits = open_splits(self)
        corpus = splits.train if split == "train" else splits.validation
        if len(corpus) > 0:
            return corpus
        where = self.dataset_path or self.dataset
        if split == "validation" and self.validation_path:
            raise ValueError(f"no text in validation_path {self.validation_path}: every file is blank or not UTF-8")
        if split == "validation" and self.validation_fraction == 0:
            raise ValueError(
                f"{where} has no validation split: validation_fraction is 0 and validation_path is not given"
            )
        other = splits.validation if split == "train" else splits.train
        if len(other) > 0:
            raise ValueError(
                f"{where} is too small to split: all {len(other)} documents are in the other split than {split!r}; "
                "give validation_path, lower max_document_bytes, or add text"
            )
        raise ValueError(f"no text in {where}: every file is blank or not UTF-8")


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split


# The train loader and every validation pass ask for the same source: one scan a process serves them all.
@lru_cache(maxsize=4)
def open_splits(source: TextSource) -> Splits:
    def index(path: str | None) -> Index:
        files = (
            python_source_files(site_packages=source.site_packages)
            if path is None
            else local_text_files(path, source.suffixes)
        )
        return Index(
            files,
            text_field=source.text_field,
            max_document_bytes=source.max_document_bytes,
            split_by=source.split_by,
        )

    name = source.dataset_path or source.dataset
    if source.validation_path:
        return pair_indices(index(source.dataset_path), index(source.validation_path), name)
    return split_index(index(source.dataset_path), name, validation_fraction=source.validation_fraction)
