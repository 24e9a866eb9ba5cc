"""Which commit of the hub a checkpoint has.

A hub id moves, and what was learned and drawn must not move with it.
"""

import re

from models.checkpoints import opening_checkpoint
from models.classifiers import check_timm_name, find_timm_id, is_timm_address
from models.hub import find_commit, is_hub_id
from models.labels import list_alternatives, resolve_name
from system.paths import split_revision


def pin_checkpoint(name: str) -> str:
    """A checkpoint's name, with its commit where it is a hub's.

    As `load_classifier` or `load_generator` take it.

    What was learned and drawn with it is then of one commit, and another one is another setting.

    Raises:
        UserError: a repository that cannot be reached, or was never downloaded.
    """
    place, revision = split_revision(name)
    kind, source = resolve_name(place)
    with opening_checkpoint(name, source, list_alternatives(name)):
        if kind == "timm" and not is_timm_address(source):
            check_timm_name(source)
            source = find_timm_id(source)
        hub_id = re.sub("^hf[-_]hub:", "", source)
        if not is_hub_id(hub_id):
            return name
        commit = find_commit(f"{hub_id}@{revision}" if revision else hub_id)
    return f"{place}@{commit}" if commit else name
