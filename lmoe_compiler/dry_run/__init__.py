"""Models compiled for ranks that do not exist.

presets.py what is asked -> capture.py graphs -> replay.py in time, memory.py -> text.py, picture.py, scaling.py.
"""
