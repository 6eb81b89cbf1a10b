"""Run by test_fork.py as `fork_scenarios.py KIND CONFIG`: forks a process with an engine, whose forks end in many ways.

Prints what each child said and how it ended; fails if the engine is not as it was afterwards.
"""

import asyncio
import gc
import os
import signal
import sys

import msgspec

from shuteye import LLM, AsyncEngine, EngineConfig, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PATIENCE_S = 60
ENDS = ("generate", "sleep", "close", "garbage")


def end_child(status):
    sys.stdout.flush()
    os._exit(status)


def say(call):
    """Call, say how it failed, and end."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 (a fork must not go on as if it were the parent)
        print("child:", type(error).__name__, error)
        end_child(0)
    end_child(3)


def with_llm(config):
    with LLM(**config) as llm:
        before = llm.generate("hello", GREEDY)[0].outputs
        for end in (*ENDS, "exit"):
            child = os.fork()
            if child == 0:
                signal.alarm(PATIENCE_S)
                match end:
                    case "generate":
                        say(lambda: llm.generate("hello", GREEDY))
                    case "sleep":
                        say(llm.sleep)
                    case "close":
                        llm.close()
                        end_child(0)
                    case "garbage":
                        del llm
                        gc.collect()
                        end_child(0)
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0, end
            assert llm.generate("hello", GREEDY)[0].outputs == before, end
        llm.sleep(1)
        llm.wake_up()
        assert llm.generate("hello", GREEDY)[0].outputs == before


async def completed(engine):
    return [output async for output in engine.generate("hello", GREEDY)][-1].outputs


async def with_async_engine(config, *, in_process):
    engine = AsyncEngine(EngineConfig(**config), in_process=in_process)
    async with engine:
        before = await completed(engine)
        for end in ENDS:
            child = os.fork()
            if child == 0:
                signal.alarm(PATIENCE_S)
                match end:
                    case "generate":
                        say(lambda: completed(engine).send(None))
                    case "sleep":
                        say(lambda: engine.sleep().send(None))
                    case "close":
                        await engine.close()
                        end_child(0)
                    case "garbage":
                        del engine._link
                        del engine
                        gc.collect()
                        end_child(0)  # as multiprocessing does; asyncio cannot be left by `exit` in a fork
            assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0, end
            assert await completed(engine) == before, end
        await engine.sleep(1)
        await engine.wake_up()
        assert await completed(engine) == before


if __name__ == "__main__":
    signal.alarm(2 * PATIENCE_S)
    settings = msgspec.json.decode(sys.argv[2])
    if sys.argv[1] == "llm":
        with_llm(settings)
    else:
        asyncio.run(with_async_engine(settings, in_process=sys.argv[1] == "thread"))
    print("the parent is well")
