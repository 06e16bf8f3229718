"""Tables fit a terminal, say everything in a notebook, and refuse rows of another length."""

from __future__ import annotations

import html
import re

import pytest

from ditdial.plain.tables import WIDTH, Table


def test_columns_stand_under_their_headings():
    table = Table(headings=("a", "name"), rows=[("1", "x"), ("10", "long")], below=("two rows",))
    assert str(table).splitlines() == [" a name", " 1    x", "10 long", "two rows"]
    left = Table(headings=("a", "name"), rows=[("1", "x")], least=(3,), left=("name",))
    assert str(left).splitlines() == ["  a name", "  1 x"]


@pytest.mark.parametrize("longest", [10, 60, 100, 1000])
def test_no_line_is_wider_than_a_terminal(longest):
    rows = [("1", "m" * longest, "g" * (longest // 2)), ("2", "short", "")]
    lines = str(Table(headings=("step", "mode", "guide"), rows=rows)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert ("…" in lines[1]) == (longest >= 60)
    assert lines[2].split() == ["2", "short"]  # the widest alone give way


def test_html_says_it_all():
    rows = [("1", "<b>" + "m" * 200), ("2", "a & b")]
    found = Table(headings=("step", "a<b"), rows=rows, below=("x > 1",)).html()
    cells = [html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", found)]
    assert cells == ["step", "a<b", "1", "<b>" + "m" * 200, "2", "a & b"]
    assert found.endswith("<p>x &gt; 1</p>")


def test_an_empty_table_has_its_headings():
    assert str(Table(headings=("a", "b"), rows=[])) == "a b"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"row = \['1'\]; legal: 2 texts"):
        Table(headings=("a", "b"), rows=[("1",)])
