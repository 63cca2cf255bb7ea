# The dense network: all epochs in one go.
_base_ = "../_base_/shapes_ssd.py"
