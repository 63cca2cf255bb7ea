# The dense network: all epochs in one go.
_base_ = "../_base_/digits_mobilenetv2.py"
