"""Processes that prepare cases at once and time them in turn, one of which may end."""

import os
import time

import pytest
from cases import of_no_kernel

of_no_kernel()
pytest.importorskip("rich")

from perf import jobs


def measure(case, report):
    """Says when it was prepared and when timed, unless its process is to end before."""
    started = time.monotonic()
    time.sleep(0.2)
    if case == "ends":
        os._exit(1)
    prepared = time.monotonic()
    yield
    if case == "ends when timed":
        os._exit(1)
    timed = time.monotonic()
    time.sleep(0.05)
    spans = (started, prepared), (timed, time.monotonic())
    report["rows"].append((case, os.getpid(), *spans))


def fails(case, report):
    """As a case whose inputs could not be made."""
    report["problems"].append(case)
    yield from ()


def rows(reports):
    return [row for report in reports for row in report["rows"]]


def test_all_are_prepared_before_the_first_is_timed_and_one_is_timed_at_a_time():
    with jobs.measuring(3, measure, "cpu") as measured:
        list(measured(["first", "to start", "all"]))  # which takes seconds
        names, processes, preparations, timings = zip(*rows(measured("abc")), strict=True)
    assert "".join(names) == "abc"
    assert len({*processes, os.getpid()}) == 4
    assert max(start for start, _ in preparations) < min(end for _, end in preparations)
    moments = [max(end for _, end in preparations), *(t for span in timings for t in span)]
    assert moments == sorted(moments)


def test_one_job_is_this_process():
    with jobs.measuring(1, measure, "cpu") as measured:
        ((name, process, *_),) = rows(measured(["a"]))
    assert (name, process) == ("a", os.getpid())


def test_a_process_that_ends_takes_one_case_along_and_is_replaced():
    with jobs.measuring(3, measure, "cpu") as measured:
        for cases in (["a", "ends", "ends when timed"], ["ends", "b"]):
            expected = [None if case.startswith("ends") else [case] for case in cases]
            reports = list(measured(cases))
            assert [report and [row[0] for row in report["rows"]] for report in reports] == expected
        assert [row[0] for row in rows(measured("cde"))] == list("cde")


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_over_before_it_is_timed_is_reported(count):
    with jobs.measuring(count, fails, "cpu") as measured:
        for case in "ab":
            (report,) = measured([case])
            assert report == {"rows": [], "kernels": [], "problems": [case]}
