"""The model that clients train: the only part of the program that knows PEFT.

Scale and the orientation of weights are settled here, once: everything above sees ΔW as
out × in and already scaled.
"""
