"""The processes of a build: each takes its share of the work, and all have the whole result."""

import torch.distributed as dist


def worker() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_worker() -> bool:
    return worker()[0] == 0


def wait_for_the_first():
    """Wait until the first worker has written what all read."""
    if dist.is_initialized():
        dist.barrier()


def shared(jobs: list, work) -> list:
    """work(job) of every job, in order; each worker does its share, and every worker gets all results."""
    rank, workers = worker()
    mine = [work(job) for job in jobs[rank::workers]]
    if workers == 1:
        return mine
    everyone = [None] * workers
    dist.all_gather_object(everyone, mine)
    return [everyone[i % workers][i // workers] for i in range(len(jobs))]
