# The dense network: all epochs in one go.
_base_ = "../_base_/digits_resnet56.py"
