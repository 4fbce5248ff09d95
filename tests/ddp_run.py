"""One distributed run, as a script: popen starts it again for every further process.

python tests/ddp_run.py STRATEGY FOLDER
"""

import sys
import warnings

import torch
from runs import Diary, module_of, trainer_of

from splitwatch import make_growable

torch.set_num_threads(1)
Wave = type(module_of())
Wave.__module__, Wave.__qualname__ = __name__, "Wave"  # where a spawned process finds it


def main(strategy, folder):
    warnings.simplefilter("ignore")
    module, diary = Wave(), Diary(folder)
    if "spawn" in strategy:
        make_growable(module)
    trainer = trainer_of([diary.in_package(), diary.watch], strategy=strategy, devices=2)
    trainer.fit(module)
    if trainer.global_rank == 0:
        torch.save([p.detach() for p in module.parameters()], f"{folder}/main")


if __name__ == "__main__":
    main(*sys.argv[1:])
