# ResNet-34 on ImageNet with CHEX's recipe.
_base_ = "./resnet50_in1k_250e.py"

model = dict(backbone=dict(depth=34), head=dict(in_channels=512))
