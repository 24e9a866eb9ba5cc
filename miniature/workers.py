"""The processes of a build: each takes its share of the work, and all get the whole result."""

import torch.distributed as dist
from tqdm import tqdm


def get_worker() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_worker() -> bool:
    return get_worker()[0] == 0


def wait_for_workers():
    """Wait until every worker is here, so that all can read what the first has written."""
    if dist.is_initialized():
        dist.barrier()


def share_jobs(jobs: list, function, title: str) -> list:
    """function(job) of every job, in order; a worker computes its share and gets all results."""
    rank, workers = get_worker()
    results = [None] * workers
    results[rank] = [function(job) for job in tqdm(jobs[rank::workers], desc=title, disable=rank > 0)]
    if workers > 1:
        dist.all_gather_object(results, results[rank])
    return [results[i % workers][i // workers] for i in range(len(jobs))]
