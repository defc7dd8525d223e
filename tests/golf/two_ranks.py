"""Two processes that finish a run together, and what may go wrong on one of them."""

import multiprocessing
import os
import time
import traceback

import torch
from golf.golf_cases import PACK, SCORING
from ports import free_port, place_of

import fastweight.artifact.hessians
import fastweight.golf.packing
import fastweight.golf.run
import fastweight.golf.scoring
from fastweight import ranks

# Forked from one server that has imported everything: a rank starts in no time.
CONTEXT = multiprocessing.get_context("forkserver")
WAIT_SECONDS = 400
CONTEXT.set_forkserver_preload(["golf.two_ranks"])


def fail(*_args):
    raise ValueError("no text here")


def fail_in(module, name):
    return lambda: setattr(module, name, fail)


TROUBLES = {
    "none": lambda: None,
    "calibration": fail_in(fastweight.artifact.hessians, "_features"),
    "packing": fail_in(fastweight.golf.packing, "_write_artifact"),
    "scoring": fail_in(fastweight.golf.scoring, "_score"),
    "no scorer": lambda: setattr(fastweight.golf.scoring, "_score", lambda *_: ""),
    "death": lambda: setattr(fastweight.golf.run, "calibrate", lambda *_: os.kill(os.getpid(), 9)),
    "sleep": lambda: setattr(fastweight.golf.run, "calibrate", lambda *_: time.sleep(600)),
}


def finish_as(rank, port, run, trouble, timeout, pipe):
    """Finish `run` as one rank; sends its ledger, or the last line of its traceback."""
    os.environ |= place_of(rank, port)
    torch.set_num_threads(1)
    TROUBLES[trouble]()
    try:
        with ranks.joined(timeout):
            ledger = fastweight.golf.run.finish(run, PACK, SCORING, say=lambda line: None, quiet=True)
        pipe.send(ledger)
    except Exception as error:
        pipe.send("".join(traceback.format_exception_only(error)).strip())


def run_two(run, trouble="none", on=1, other="none", timeout=3600.0, wait_for=(0, 1)):
    """What each rank of `wait_for` sent, None from one that died; both have ended, or are ended, afterwards."""
    port = free_port()
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    processes = [
        CONTEXT.Process(
            target=finish_as, args=(rank, port, str(run), trouble if rank == on else other, timeout, ends[rank][1])
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for _, sender in ends:
        sender.close()
    try:
        return [_received(ends[rank][0]) for rank in wait_for]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _received(end):
    # Long before the time-out of the ranks, and long after any honest run, also on a machine with much else to do.
    assert end.poll(WAIT_SECONDS), "a rank neither ended nor failed"
    try:
        return end.recv()
    except EOFError:
        return None
