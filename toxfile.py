"""tox plug-in: remove environments with ``remove_after = true`` after their run.

Each torch of the matrix takes about 5 GB. An environment is removed whether its run passes, fails
or is interrupted, unless TOX_KEEP is set.
"""

import os
import shutil

from tox.plugin import impl


@impl
def tox_add_env_config(env_conf, state):
    """Declare the setting ``remove_after``."""
    env_conf.add_config(
        keys="remove_after",
        of_type=bool,
        default=False,
        desc="remove the environment when it ends, unless TOX_KEEP is set",
    )


@impl
def tox_env_teardown(tox_env):
    """Remove the environment after its run."""
    if not tox_env.conf["remove_after"] or os.environ.get("TOX_KEEP"):
        return
    if tox_env.env_dir.is_dir():
        shutil.rmtree(tox_env.env_dir)
