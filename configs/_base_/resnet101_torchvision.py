# ResNet-101, as MMPretrain builds it, with torchvision's first ImageNet weights, classifier included.
_base_ = "mmpretrain::_base_/models/resnet101.py"

weights = dict(type="Pretrained", checkpoint="torchvision://resnet101")
model = dict(backbone=dict(init_cfg=weights), head=dict(init_cfg=weights))
