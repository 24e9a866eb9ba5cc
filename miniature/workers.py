"""The processes of a build: each does its part of the work, and all get the whole result."""

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm


def share_jobs(jobs, function, title: str) -> list:
    """Return the results of function(job) for every job, in order.

    Each worker computes a part of them, and all get all results.
    """
    workers = PartialState(cpu=True)
    with workers.split_between_processes(list(jobs)) as part:
        return gather_object(
            [function(job) for job in tqdm(part, desc=title, disable=not workers.is_main_process)]
        )
