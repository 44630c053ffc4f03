"""What is done with a pruned model: answers, evaluation, calibration, the embedded model, the command line.

What prunes imports nothing from here. The modules keep their public names: `from flexasl import evaluation, run`.
"""
