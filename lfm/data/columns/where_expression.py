"""Expressions over the columns of samples, such as `score > 0.5 and class in ('dress', 'coat')`.

Operands are columns, numbers, texts in quotes, True, False and None. They are compared by `== != < <= > >=`, also in chains
such as `256 <= width < 2048`; `in` and `not in` take a tuple of values. `like(COLUMN, 'a%b_')` compares with a pattern of SQL,
where % is any text and _ any character; `match(COLUMN, 'REGEX')` searches for a regular expression. A column of type bool is a
condition by itself. Conditions are joined by `and`, `or`, `not` and parentheses. A sample without a value is in no comparison
with it except `== None`, also not after `not`.

An expression is parsed by Python's grammar, checked node by node and translated for pyarrow; it is never evaluated as code.
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import io
import operator
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lfm.data.columns.column_index import import_pyarrow
from lfm.data.manifest import ColumnType
from lfm.errors import ConfigError

LONGEST = 4000  # characters
DEEPEST = 40  # levels of parentheses
_WORDS = {"and", "or", "not", "in", "True", "False", "None"}  # of Python; all other names are columns or functions
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS = {"like": "match_like", "match": "match_substring_regex"}
_WORD_OF_TYPE = {"int": "a number", "float": "a number", "text": "text", "bool": "True or False"}


@dataclass(frozen=True)
class WhereExpression:
    """A checked condition on samples."""

    text: str
    columns: tuple[str, ...]  # that it reads
    condition: Any  # a pyarrow.compute.Expression over them


def parse_where(text: str, types: Mapping[str, ColumnType], place: str) -> WhereExpression:
    """Return the condition of an expression.

    Args:
        types: of the columns that samples have.
        place: the key and folder, at the beginning of messages.

    Raises:
        ConfigError: it is no expression of this kind, or names an unknown column or a value of a wrong type; lists the columns.
    """
    translator = _Translator(types, place, import_pyarrow(place))
    tree = translator.parse(text)
    condition = translator.condition(tree, 0)
    if not translator.columns:
        translator.refuse("names no column")
    return WhereExpression(text, tuple(sorted(translator.columns)), condition)


class _Translator:
    def __init__(self, types: Mapping[str, ColumnType], place: str, pyarrow: Any) -> None:
        self.types, self.place, self.pyarrow, self.compute = types, place, pyarrow, pyarrow.compute
        self.columns: set[str] = set()

    def refuse(self, reason: str) -> NoReturn:
        known = ", ".join(f"{name} ({kind})" for name, kind in self.types.items())
        raise ConfigError(f"{self.place}: {' '.join(reason.split())}; its columns are {known}")

    def parse(self, text: str) -> ast.expr:
        """Return the syntax tree of an expression.

        Raises:
            ConfigError: it is too long, or no expression.
        """
        if len(text) > LONGEST:
            self.refuse(f"is longer than {LONGEST} characters")
        try:
            # A column may have the name of a keyword, such as class: every name gets a suffix, which `_name` removes.
            tokens = [
                (token.type, token.string + ("_" if token.type == tokenize.NAME and token.string not in _WORDS else ""))
                for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)
            ]
            return ast.parse(tokenize.untokenize(tokens), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
            reason = error.args[0] if error.args else "nested too deeply"
            self.refuse(f"cannot be read as an expression ({reason})")

    def condition(self, node: ast.expr, depth: int) -> Any:
        """Return an expression of type bool."""
        if depth > DEEPEST:
            self.refuse("is nested too deeply")
        match node:
            case ast.BoolOp(op=op, values=values):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return functools.reduce(join, [self.condition(value, depth + 1) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand, depth + 1)
            case ast.Compare(left=left, ops=ops, comparators=others):
                pairs = zip([left, *others], ops, others, strict=False)
                return functools.reduce(operator.and_, [self._comparison(*pair) for pair in pairs])
            case ast.Call(func=ast.Name(id=function), args=[column, pattern], keywords=[]):
                return self._pattern(_name(function), column, pattern)
            case ast.Name():
                field, kind = self._operand(node)
                if kind != "bool":
                    self.refuse(f"{_name(node.id)} is {_WORD_OF_TYPE[kind or 'bool']} and no condition by itself")
                return field
        self.refuse(f"{_shown(node)} is no condition")

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            return self._membership(left, right, isinstance(op, ast.NotIn))
        if type(op) not in _COMPARISONS:
            self.refuse(f"{_shown(right)}: compare by ==, !=, <, <=, >, >= or in")
        (first, kind), (second, other) = self._operand(left), self._operand(right)
        if kind is None or other is None:
            if kind == other or not isinstance(op, ast.Eq | ast.NotEq):
                self.refuse("None stands for a missing value: compare a column with it by == or !=")
            field = first if other is None else second
            return field.is_null() if isinstance(op, ast.Eq) else field.is_valid()
        self._check_types(left, kind, right, other)
        return _COMPARISONS[type(op)](first, second)

    def _membership(self, left: ast.expr, right: ast.expr, is_negative: bool) -> Any:
        field, kind = self._operand(left)
        if not isinstance(right, ast.Tuple | ast.List) or not right.elts or not isinstance(left, ast.Name):
            self.refuse("in takes a column and a tuple of values, such as class in ('a', 'b')")
        values = []
        for element in right.elts:
            value = self._constant(element)
            if value is None:
                self.refuse("None stands for a missing value: compare a column with it by == or !=")
            self._check_types(left, kind, element, _type_of(value))
            values.append(value)
        if kind in ("int", "float"):  # arrow would refuse a whole number in a column of fractions, and the reverse
            kinds = {_type_of(value) for value in values} | {kind}
            values = values if kinds == {"int"} else [float(value) for value in values]
            field = field if kinds == {"int"} else field.cast(self.pyarrow.float64())
        is_member = field.isin(values)
        return ~is_member & field.is_valid() if is_negative else is_member

    def _pattern(self, function: str, column: ast.expr, pattern: ast.expr) -> Any:
        if function not in _FUNCTIONS:
            self.refuse(f"{function} is no function; like and match are")
        field, kind = self._operand(column)
        value = self._constant(pattern)
        if kind != "text" or not isinstance(column, ast.Name) or not isinstance(value, str):
            self.refuse(f"{function} takes a column of type text and a pattern in quotes")
        try:
            kernel = getattr(self.compute, _FUNCTIONS[function])
            kernel(self.pyarrow.array([""]), value)  # which compiles the pattern
            return kernel(field, value)
        except self.pyarrow.ArrowException as error:
            self.refuse(f"{function}: {error}")

    def _operand(self, node: ast.expr) -> tuple[Any, ColumnType | None]:
        """Return a column or a constant, and its type; None has the type None."""
        if not isinstance(node, ast.Name):
            value = self._constant(node)
            return self.compute.scalar(value), _type_of(value)
        name = _name(node.id)
        if name not in self.types:
            near = difflib.get_close_matches(name, self.types, 1)
            self.refuse(f"no column is called {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        self.columns.add(name)
        return self.compute.field(name), self.types[name]

    def _constant(self, node: ast.expr) -> int | float | str | bool | None:
        match node:
            case ast.Constant(value=int() | float() | str() | bool() | None as value):
                if isinstance(value, int) and not -(2**63) <= value < 2**63:
                    self.refuse(f"{_shown(node)} is too large")
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(
                value, bool
            ):
                if abs(value) >= 2**63:
                    self.refuse(f"{_shown(node)} is too large")
                return -value
        self.refuse(f"{_shown(node)} is no number, no text in quotes and no column")

    def _check_types(self, left: ast.expr, kind: ColumnType | None, right: ast.expr, other: ColumnType | None) -> None:
        if kind and other and _WORD_OF_TYPE[kind] != _WORD_OF_TYPE[other]:
            self.refuse(
                f"{_shown(left)} is {_WORD_OF_TYPE[kind]} and {_shown(right)} is {_WORD_OF_TYPE[other]}, which are not "
                "comparable"
            )


def _type_of(value: int | float | str | bool | None) -> ColumnType | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "float" if isinstance(value, float) else "text"


def _name(identifier: str) -> str:
    """Return the name that `parse` gave a suffix."""
    return identifier[:-1]


def _shown(node: ast.AST) -> str:
    """Return a part of an expression as it was written, in short."""
    shown = copy.deepcopy(node)
    for part in ast.walk(shown):
        if isinstance(part, ast.Name):
            part.id = _name(part.id)
    text = ast.unparse(shown)
    return text if len(text) <= 40 else f"{text[:37]}..."
