# The dense network: all epochs in one go.
_base_ = "../_base_/shapes_maskrcnn.py"
