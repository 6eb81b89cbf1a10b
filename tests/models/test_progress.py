"""Progress in the log: what someone sees who starts a server for the first time."""

import logging

from shuteye.models import progress
from shuteye.models.progress import Advanced, Failed, Finished, LoggedProgress, Started


def test_steps_are_logged_with_how_far_they_are(caplog, monkeypatch):
    """Would catch minutes of silence while a large checkpoint is converted."""
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    steps = LoggedProgress()
    with caplog.at_level(logging.INFO):
        steps(Started("Reading"))
        steps(Advanced(5))
        steps(Finished())
        steps(Started("Writing", 200))
        steps(Advanced(50))
        steps(Finished())
    reading, read, writing, half, written = [record.getMessage() for record in caplog.records]
    assert (reading, writing, half) == ("Reading ...", "Writing ...", "Writing: 25%")
    assert read.startswith("Reading: done in ")
    assert written.startswith("Writing: done in ")


def test_a_step_that_failed_is_logged_as_failed(caplog):
    """Would catch "done in 0.1 s" for a download that came to nothing."""
    steps = LoggedProgress()
    with caplog.at_level(logging.INFO):
        steps(Started("Downloading"))
        steps(Failed("the hub is out of reach. Falling back to the wheel."))
    said = caplog.records[-1]
    assert said.levelno == logging.WARNING
    assert said.getMessage().startswith("Downloading: failed after ")
    assert said.getMessage().endswith(": the hub is out of reach. Falling back to the wheel.")
