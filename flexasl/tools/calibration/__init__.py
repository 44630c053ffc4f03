"""Which settings suit a model? Found on generated prompts, each read once, by replaying the rule on what was recorded.

    calibration = flexasl.calibrate(model, tokenizer, flexasl.ASLConfig(select_tokens=512), length=4096)
    print(calibration)  # what was chosen, and how it does on prompts that it was not chosen on
    flexasl.patch(model, calibration.config)

`flexasl calibrate` is the same on a command line.
"""

from flexasl.tools.calibration.calibrating import calibrate, calibrate_visibly
from flexasl.tools.calibration.evidence import Calibration

__all__ = ["Calibration", "calibrate", "calibrate_visibly"]
