"""The printer's diff: numbers of values don't count, what they stand for does."""

from expecttest import assert_expected_inline as assert_text

from sparsefx.report.printer import diff

BEFORE = """\
%0 = input(x) : float32[2]
%1 = relu(%0) : float32[2]
%2 = neg(%1) : float32[2]
%3 = exp(%2) : float32[2]
%4 = sin(%3) : float32[2]
%5 = cos(%4) : float32[2]
return [%5]"""


def test_equal_graphs():
    assert diff(BEFORE, BEFORE) == ""


def test_an_inserted_line_shows_alone():
    after = """\
%0 = input(x) : float32[2]
%1 = relu(%0) : float32[2]
%2 = mask(%1) : bool[2]
%3 = neg(%1) : float32[2]
%4 = exp(%3) : float32[2]
%5 = sin(%4) : float32[2]
%6 = cos(%5) : float32[2]
return [%6]"""
    assert_text(diff(BEFORE, after), """\
--- before
+++ after
@@ -1 +1 @@
 %0 = input(x) : float32[2]
 %1 = relu(%0) : float32[2]
+%2 = mask(%1) : bool[2]
 %3 = neg(%1) : float32[2]
 %4 = exp(%3) : float32[2]""")  # fmt: skip


def test_a_replaced_line_leaves_its_users_alone():
    after = BEFORE.replace("neg(%1)", "abs(%1)")
    assert_text(diff(BEFORE, after, ("old", "new")), """\
--- old
+++ new
@@ -1 +1 @@
 %0 = input(x) : float32[2]
 %1 = relu(%0) : float32[2]
-%2 = neg(%1) : float32[2]
+%2 = abs(%1) : float32[2]
 %3 = exp(%2) : float32[2]
 %4 = sin(%3) : float32[2]""")  # fmt: skip


def test_a_line_that_reads_another_value_shows():
    after = BEFORE.replace("sin(%3)", "sin(%1)")
    assert_text(diff(BEFORE, after), """\
--- before
+++ after
@@ -3 +3 @@
 %2 = neg(%1) : float32[2]
 %3 = exp(%2) : float32[2]
-%4 = sin(%3) : float32[2]
+%4 = sin(%1) : float32[2]
 %5 = cos(%4) : float32[2]
 return [%5]""")  # fmt: skip


def test_a_removed_line_shows_with_the_users_that_it_leaves():
    after = """\
%0 = input(x) : float32[2]
%1 = neg(%0) : float32[2]
%2 = exp(%1) : float32[2]
%3 = sin(%2) : float32[2]
%4 = cos(%3) : float32[2]
return [%4]"""
    assert_text(diff(BEFORE, after), """\
--- before
+++ after
@@ -1 +1 @@
 %0 = input(x) : float32[2]
-%1 = relu(%0) : float32[2]
-%2 = neg(%1) : float32[2]
+%1 = neg(%0) : float32[2]
 %2 = exp(%1) : float32[2]
 %3 = sin(%2) : float32[2]""")  # fmt: skip
