# The dense network: all epochs in one go. A constant learning rate in the first half, as StrucSpars has it, gives more
# than two cycles (89.9 to 87.7, validation split); then one cycle, as in the rows that are cut half way.
_base_ = "../_base_/digits_mobilenetv2.py"

param_scheduler = [
    dict(_base_.warmup, begin=0, end=20),
    dict(_base_.warmup, begin=990, end=1010),
    dict(_base_.cycle, begin=30, end=60),
]
