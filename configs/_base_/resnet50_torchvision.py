# ResNet-50, as MMPretrain builds it, with torchvision's first ImageNet weights, classifier included.
_base_ = "mmpretrain::_base_/models/resnet50.py"

weights = dict(type="Pretrained", checkpoint="torchvision://resnet50")
model = dict(backbone=dict(init_cfg=weights), head=dict(init_cfg=weights))
