"""`python_source`: the .py files of the Python installation that runs the program. Real text that every machine has."""

import os
import sysconfig

from flexrattn.data.corpus import SourceFile, walk_files

# The standard library is taken without its own tests: half of its bytes, and many distributions strip them.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def python_source_files(*, site_packages: bool) -> list[SourceFile]:
    """Names are `stdlib/...` and, if asked, `site-packages/...` (of the virtual environment, where one is active).

    ValueError when the installation has no source files (a zipped or frozen standard library).
    """
    stdlib = sysconfig.get_path("stdlib")
    files = [
        SourceFile(f"stdlib/{file.name}", file.path)
        for file in walk_files(stdlib, [".py"], skip_directories=_NOT_STDLIB)
    ]
    if not files:
        raise ValueError(f"this Python has no source files below {stdlib}: use dataset 'local' with a dataset_path")
    if site_packages:
        # purelib and platlib are one directory on most systems.
        for root in sorted({os.path.realpath(sysconfig.get_path(key)) for key in ("purelib", "platlib")}):
            files += [SourceFile(f"site-packages/{file.name}", file.path) for file in walk_files(root, [".py"])]
    return files
