"""Local text: a .txt or .jsonl file, or a folder of them."""

import os
from collections.abc import Sequence

from flexrattn.data.corpus import SourceFile, walk_files


def local_text_files(path: str, suffixes: Sequence[str]) -> list[SourceFile]:
    """The file itself, whatever its suffix, or every file below the folder with one of `suffixes`.

    ValueError when the path does not exist, cannot be read, or holds no such file.
    """
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            raise ValueError(f"data path {path} cannot be read: check its permissions")
        return [SourceFile(os.path.basename(path), path)]
    if not os.path.isdir(path):
        raise ValueError(f"data path {path} does not exist (relative paths start at {os.getcwd()})")
    files = walk_files(path, suffixes)
    if not files:
        raise ValueError(f"data path {path} holds no file that ends in {', '.join(suffixes)}")
    return files
