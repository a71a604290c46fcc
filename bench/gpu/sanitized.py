"""One call of every op on a small sample, for compute-sanitizer to watch."""

from __future__ import annotations

import torch
from promises import op_cases
from stage import Stage

if __name__ == "__main__":
    stage = Stage(__doc__)
    with torch.no_grad():
        for case, make in op_cases(stage, each=1):
            if stage.time_left() < 1:
                break
            make()()
            if stage.device.type == "cuda":
                torch.cuda.synchronize()
            stage.emit(table="watched", case=case)
