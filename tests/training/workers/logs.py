"""What each process logs, with the launcher's variables alone and with an open run."""

import json
import logging
import sys
from pathlib import Path

import torch  # noqa: F401
from torchport import PartialState
from torchport.logging import get_logger
from torchport.utils import tqdm

folder = Path(sys.argv[1])
logger = get_logger("worker", log_level="INFO")
file = logging.FileHandler(folder / "all.log")  # one file for all, opened to append
file.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
logging.getLogger("worker").addHandler(file)

found = {}
logger.info("early, main process")
try:
    logger.info("early, in order", main_process_only=False, in_order=True)
except Exception as error:
    found["in order"] = str(error)
found["bar"] = [not tqdm(range(3)).disable, not tqdm(range(3), main_process_only=False).disable]

state = PartialState()
logger.info("main process")
logger.debug("below the level", main_process_only=False, in_order=True)
for line in (1, 2, 3):
    logger.info("rank %d, line %d", state.process_index, line, main_process_only=False, in_order=True)
logger.warning_once("once, %s", "main process")
logger.warning_once("once, %s", "main process")
state.wait_for_everyone()
found["log"] = (folder / "all.log").read_text().splitlines()
(folder / f"rank{state.process_index}.json").write_text(json.dumps(found))
state.destroy_process_group()
