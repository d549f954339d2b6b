"""Generated modules on disk: written once under their content's hash, imported from there, editable by the user.

`LMOE_KERNEL_DIR` chooses the folder (default ~/.cache/lmoe). A file there that was edited is used as it is,
with a warning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from lmoe_compiler.codegen.triton_key import keep_triton_key
from lmoe_compiler.config import environment
from lmoe_compiler.debug import show


def kernel_folder() -> Path:
    chosen = environment()
    return chosen.kernel_dir or chosen.cache_dir


def module_path(variant: str, text: str) -> Path:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return kernel_folder() / f"{variant}-{digest}.py"


def load_module(variant: str, text: str) -> ModuleType:
    """The module with this text. Several processes may write the same file: the rename is atomic."""
    path = module_path(variant, text)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(text)
        os.replace(draft, path)
    elif path.read_text() != text:
        warnings.warn(
            f"using the edited kernels in {path}; delete the file to regenerate it", stacklevel=2
        )
    name = f"lmoe_generated_{path.stem.replace('-', '_')}"
    if name not in sys.modules:
        show("triton", str(path), lambda: text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        keep_triton_key()
    return sys.modules[name]
