"""Sleeps and wakes of every kind, one after the other."""

from shuteye.calls import ReloadCall, SleepCall, WakeCall


def one_cycle(harness, number, chooser):
    """A sleep and a wake, each kind in turn."""
    match number % 5:
        case 0 | 1:
            harness.call(SleepCall(1, mode=chooser.choice(["wait", "keep"])))
            harness.call(WakeCall())
        case 2:
            harness.call(SleepCall(2, mode="keep"))
            harness.call(WakeCall())
        case 3:
            harness.call(SleepCall(1, mode="keep"))
            for tag in chooser.sample(["weights", "kv_cache"], 2):
                harness.call(WakeCall((tag,)))
        case 4:
            harness.call(SleepCall(2, mode="keep"))
            harness.call(WakeCall(("weights",)))
            harness.call(ReloadCall())
            harness.call(WakeCall(("kv_cache",)))
