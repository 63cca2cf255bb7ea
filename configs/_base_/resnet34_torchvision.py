# ResNet-34, as MMPretrain builds it, with torchvision's first ImageNet weights, classifier included.
_base_ = "mmpretrain::_base_/models/resnet34.py"

weights = dict(type="Pretrained", checkpoint="torchvision://resnet34")
model = dict(backbone=dict(init_cfg=weights), head=dict(init_cfg=weights))
