"""The rules of docs/architecture.md, section 1: where imports may point, and what a file, a folder and a name may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lfm
import pipelines

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("lfm", "pipelines", "launch")
MOST_LINES, MOST_FILES, MOST_FUNCTION_LINES = 500, 14, 60

# The third-party packages that only some modules may import.
OWNERS = {
    "fsspec": ("lfm.storage.files",),
    "deepspeed": ("lfm.training.engine",),
    "click": ("pipelines.cli",),
    "ruamel": ("pipelines.common.experiment.config_file",),
}
# The rooms of lfm, the lowest floor first. A room imports from the floors below its own and from itself.
FLOORS = (
    {"errors", "types", "world"},
    {"storage", "prefetch", "precision", "tensor_file"},
    {"models", "flow", "solvers"},
    {"data", "synthetic", "tensor_file", "adapters"},
    {"weights_file", "autoencoder"},
    {"training", "inference", "conversion", "metrics"},
)
MATHEMATICS = FLOORS[2]
# Imports between rooms of one floor that are meant: likelihood and training objectives integrate with the solvers.
NEIGHBOURS = {("flow", "solvers")}


@dataclass(frozen=True)
class Edge:
    """One import."""

    importer: str  # full name of the importing module
    imported: str  # full name of the imported module, or of the name that is imported from it
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: imports {self.imported}"


def edges_of(importer: str, source: str, *, is_package: bool = False) -> Iterator[Edge]:
    """All imports of a module, wherever they are in it, those under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Edge(importer, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = importer.split(".")[: (None if is_package else -1)] if node.level else []
            base = ".".join([*above[: len(above) - max(node.level - 1, 0)], *([node.module] if node.module else [])])
            yield from (Edge(importer, f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "(a computed name)"
            yield Edge(importer, str(name), node.lineno)


def modules() -> dict[str, Path]:
    """The file of every module by its full name."""
    result = {}
    for path in (path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        result[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return result


def edges() -> list[Edge]:
    return [
        edge
        for name, path in modules().items()
        for edge in edges_of(name, path.read_text(), is_package=path.name == "__init__.py")
    ]


def is_stage(module: str) -> bool:
    """Whether a module of pipelines has a public `run`, which the command line calls."""
    path = modules().get(module)
    if path is None or not module.startswith("pipelines."):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in ast.parse(path.read_text()).body)


def floor(module: str) -> int | None:
    """The floor of a module of lfm or of one of its names; None outside lfm, and for lfm itself."""
    parts = module.split(".")
    if parts[0] != "lfm" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    numbers = [number for number, rooms in enumerate(FLOORS) if parts[1] in rooms]
    assert numbers, f"{module}: add its room to FLOORS"
    return numbers[0]


def violation(edge: Edge) -> str | None:
    """The rule that an import breaks; None if it breaks none."""
    importer, imported = edge.importer.split("."), edge.imported.split(".")
    owners = OWNERS.get(imported[0], (edge.importer,))
    if not any(edge.importer == owner or edge.importer.startswith(f"{owner}.") for owner in owners):
        return f"only {', '.join(owners)} may"
    if importer[0] == "lfm" and imported[0] in ("pipelines", "launch"):
        return "the library does not depend on the stages"
    if importer[0] == "pipelines" and imported[0] == "launch":
        return "nothing imports launch"
    if importer[0] == "launch":
        return None if imported[0] in ("pipelines", "__future__") else "launch imports pipelines only"
    if importer[0] == imported[0] == "pipelines" and importer[1:2] != ["cli"]:
        room, other = importer[1], imported[1] if len(imported) > 1 else ""
        if other not in (room, "common"):
            return "a room of stages imports itself and common only"
        if is_stage(edge.imported) or is_stage(edge.imported.rpartition(".")[0]):
            return "stages never import one another"
    above, below = floor(edge.importer), floor(edge.imported)
    if above is None or below is None or importer[1] == imported[1]:
        return None
    if imported[1] == "synthetic":
        return "the library does not depend on synthetic data"
    if below > above or (below == above and above > 1 and (importer[1], imported[1]) not in NEIGHBOURS):
        return f"{imported[1]} is not below {importer[1]}"
    if importer[1] in MATHEMATICS and imported[1] not in MATHEMATICS | FLOORS[0] - {"world"}:
        return "the mathematics imports errors and types only"
    return None


def test_imports_point_one_way() -> None:
    wrong = [f"{edge}: {reason}" for edge in edges() if (reason := violation(edge))]
    assert not wrong, "\n" + "\n".join(wrong)
    assert len(edges()) > 150, "the walk finds the imports"


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("lfm.flow.path", "from pipelines.common import factory"),
        ("lfm.flow.path", "import click"),
        ("lfm.data.stream.sample_order", "def f():\n    from ruamel.yaml import YAML"),
        ("lfm.data.stream.latent_stream", "from fsspec.core import url_to_fs"),
        ("lfm.training.ema", "import deepspeed.utils as d"),
        ("pipelines.training.train", "from deepspeed import zero"),
        ("lfm.flow.path", "from lfm import storage"),
        ("lfm.flow.path", "from lfm.world import World"),
        ("lfm.models.dit", "from lfm.flow.path import path_sample"),
        ("lfm.models.dit", "from lfm.data.stream.sample_order import Order"),
        ("lfm.models.dit", "from ..data.stream import sample_order"),
        ("lfm.data.manifest", "from lfm.training.run_folder import RunFolder"),
        ("lfm.data.manifest", "from lfm.synthetic.scenes import draw"),
        ("lfm.inference.trained_model", "from lfm.training.ema import Ema"),
        ("lfm.storage.files", "from ..training.ema import Ema"),
        ("lfm.errors", "from lfm import storage"),
        ("pipelines.training.train", "from pipelines.data.encode import run"),
        ("pipelines.training.train", "from pipelines.sampling import sample"),
        ("pipelines.training.train", "from . import post_hoc_ema"),
        ("pipelines.evaluation.evaluate", "from pipelines.sampling.sample_record import FIELDS"),
        ("pipelines.common.factory", "from pipelines.training import train"),
        ("pipelines.common.factory", "from pipelines.cli.main import main"),
        ("pipelines.sampling.sample", "import importlib\nimportlib.import_module('pipelines.training.train')"),
        ("pipelines.sampling.sample", "import launch.train"),
        ("launch.train", "import torch"),
        ("launch.train", "from lfm.flow import path"),
    ],
)
def test_a_wrong_import_is_reported(importer: str, statement: str) -> None:
    assert any(violation(edge) for edge in edges_of(importer, statement))


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("lfm.storage.files", "import fsspec\nfrom lfm.errors import StorageError"),
        ("lfm.models.dit", "from lfm.models.attention import attend\nfrom lfm.types import Condition"),
        (
            "lfm.data.stream.latent_stream",
            "from lfm import storage\nfrom lfm.flow.null_condition import drop_condition",
        ),
        ("lfm.training.run_folder", "from lfm.data.manifest import Manifest"),
        ("pipelines.cli.main", "import click\nfrom pipelines.training.train import run"),
        (
            "pipelines.training.train",
            "from pipelines.common import factory\nfrom lfm.training.engine import Engine",
        ),
        ("launch.train", "from pipelines.cli.model_commands import train"),
    ],
)
def test_a_right_import_is_accepted(importer: str, statement: str) -> None:
    assert not [reason for edge in edges_of(importer, statement) if (reason := violation(edge))]


def test_no_module_imports_itself_through_others() -> None:
    names = modules()
    graph: dict[str, set[str]] = {name: set() for name in names}
    for edge in edges():
        target = edge.imported if edge.imported in names else edge.imported.rpartition(".")[0]
        if target in names and target != edge.importer:
            graph[edge.importer].add(target)
    circles = [name for name in graph if name in reachable(graph, name)]
    assert not circles, f"in a circle of imports: {', '.join(circles)}"


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All modules that a module imports, directly or through others."""
    result: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in result:
            result.add(name)
            waiting += graph[name]
    return result


def test_a_name_stands_for_one_thing() -> None:
    paths = [path for path in modules().values() if path.name != "__init__.py" and path.parent.name != "launch"]
    stems = Counter(path.stem for path in paths)
    classes = Counter(
        node.name for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    )
    twice = [name for names in (stems, classes) for name, count in names.items() if count > 1]
    assert not twice, f"two modules or classes of one name: {', '.join(twice)}"


def test_files_and_folders_are_small(capsys: pytest.CaptureFixture[str]) -> None:
    paths = list(modules().values())
    long = [str(path) for path in paths if len(path.read_text().splitlines()) > MOST_LINES]
    folders = Counter(path.parent.relative_to(REPOSITORY).as_posix() for path in paths)
    with capsys.disabled():
        largest, count = folders.most_common(1)[0]
        print(f"\n{len(paths)} files in {len(folders)} folders; at most {count} in one ({largest})")
    assert not long, f"over {MOST_LINES} lines: {', '.join(long)}"
    full = [f"{folder} ({count})" for folder, count in folders.items() if count > MOST_FILES]
    assert not full, f"over {MOST_FILES} files: {', '.join(full)}"


def test_functions_fit_a_screen() -> None:
    long = [
        f"{name}: {node.name} has {length} lines"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert not long, "\n" + "\n".join(long)


def test_variables_are_nouns() -> None:
    """A participle says that something was done, but not what the value is."""
    participles = {"found", "kept", "told", "given", "there", "made", "taken", "lack"}
    names = [
        f"{name}, line {node.lineno}: {text}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        for text in ([node.id] if isinstance(node, ast.Name) else [node.arg] if isinstance(node, ast.arg) else [])
        if text in participles
    ]
    assert not names, "\n" + "\n".join(names)


def test_no_line_saving_tricks() -> None:
    """Neither `# fmt: skip` nor a literal that is unpacked where it is written, as in f(*(a, b), *(c, d))."""
    tricks = []
    for name, path in modules().items():
        source = path.read_text()
        tricks += [f"{name}: fmt: skip" for _ in re.findall(r"#\s*fmt:\s*(?:skip|off)", source)]
        tricks += [
            f"{name}, line {node.lineno}: unpacks a literal"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List | ast.Set)
        ]
    assert not tricks, "\n" + "\n".join(tricks)


def test_nothing_outside_models_names_a_backbone() -> None:
    """The registry stands for them; conversion is excepted, since published checkpoints are of one backbone each."""
    names = [
        f"{name}, line {node.lineno}: {text}"
        for name, path in modules().items()
        if not name.startswith(("lfm.models", "lfm.conversion"))
        for node in ast.walk(ast.parse(path.read_text()))
        for text in identifiers(node)
        if re.fullmatch(r"(DiT|UNet)(Config|Block|Options)?", text)
    ]
    assert not names, "\n" + "\n".join(names)


def identifiers(node: ast.AST) -> list[str]:
    """The names that a node of the syntax tree uses or imports."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [node.name.rpartition(".")[2]] if isinstance(node, ast.alias) else []


def messages(source: str) -> list[ast.Constant]:
    """The strings of a module that are not docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node for node in strings if id(node) not in docstrings]


def test_the_library_names_arguments_and_no_flags() -> None:
    """The command line translates `num_steps` to --num-steps; flags of other programs are excepted."""
    flags = [
        f"{name}, line {node.lineno}: {node.value}"
        for name, path in modules().items()
        if name.startswith("lfm")
        for node in messages(path.read_text())
        if re.search(r"(?<!deepspeed )(?<![-\w])--[a-z]", str(node.value))
    ]
    assert not flags, "\n" + "\n".join(flags)


def test_an_image_is_called_an_image() -> None:
    """`pictures` remains as a key of files written by earlier versions, and in the names of two configurations."""
    lines = [
        f"{name}: {line.strip()}"
        for name, path in modules().items()
        for line in path.read_text().splitlines()
        if re.search("picture", re.sub(r'"pictures"|pictures_\d+', "", line), re.IGNORECASE)
    ]
    assert not lines, "\n" + "\n".join(lines)


# Personifications, riddles and inverted sentences that once stood in the code; docs/architecture.md, section 4.
PHRASES = (
    r"go(es)? on (from|with)|(is|are|was) told|hears?\b|heard\b|leads? away|meets nobody|(take|in) turns|leaves behind"
    r"|for people|what (there is|is there)|made otherwise|the same command goes on|asked to leave|looks? away|stands beside"
    r"|by any name"
)


def test_sentences_are_plain() -> None:
    lines = [
        f"{name}, line {number}: {line.strip()}"
        for name, path in modules().items()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(rf"\b({PHRASES})", line, re.IGNORECASE)
    ]
    assert not lines, "\n" + "\n".join(lines)


def test_test_modules_import_helpers_from_support_alone() -> None:
    imports = [
        f"{path.relative_to(REPOSITORY)}: {line}"
        for path in (REPOSITORY / "tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) tests\b(?!\.support)", line)
    ]
    assert not imports, "\n" + "\n".join(imports)


def test_folders_of_tests_are_those_of_the_code() -> None:
    tests = REPOSITORY / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")} - {Path()}
    assert not [str(folder) for folder in folders if not list((REPOSITORY / folder).glob("*.py"))]


def test_launch_holds_one_python_file() -> None:
    """A second module there could hide a library of the same name: `launch/` is the first entry of sys.path."""
    assert [path.name for path in (REPOSITORY / "launch").rglob("*.py")] == ["train.py"]


def test_this_checkout_is_the_one_that_is_installed() -> None:
    places = {Path(str(package.__file__)).resolve().parents[1] for package in (lfm, pipelines)}
    assert places == {REPOSITORY.resolve()}, "another installation comes first on sys.path"


def test_every_package_is_listed_for_installation() -> None:
    """Automatic discovery refuses two top-level packages, so setup.cfg lists them all."""
    listed = (REPOSITORY / "setup.cfg").read_text().split("\npackages =", 1)[1].split("python_requires", 1)[0].split()
    paths = [path for package in ("lfm", "pipelines") for path in (REPOSITORY / package).rglob("*.py")]
    packages = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in paths if path.name == "__init__.py"}
    with_modules = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in paths}
    at_the_root = {"pipelines.configs", "pipelines.configs.deepspeed", "pipelines.configs.parts", "pipelines.launch"}
    assert set(listed) - at_the_root == packages == with_modules


@pytest.mark.parametrize(
    "statement",
    [
        "import pipelines.cli.main",
        "import pipelines.data.shard",
        "import lfm.types, lfm.storage, lfm.data.manifest",
    ],
)
def test_help_needs_no_torch(statement: str) -> None:
    script = (
        f"{statement}\nimport sys\nprint([name for name in ('torch', 'diffusers', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
