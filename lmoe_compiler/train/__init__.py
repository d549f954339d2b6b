"""Training on text: data, loop, checkpoints, display. Needs the `train` extra; `lmoe train`
starts here.
"""
