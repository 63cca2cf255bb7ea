# ResNet-101 on ImageNet with CHEX's recipe.
_base_ = "./resnet50_in1k_250e.py"

model = dict(backbone=dict(depth=101), head=dict(in_channels=2048))
