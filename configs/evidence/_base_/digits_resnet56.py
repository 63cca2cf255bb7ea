# ResNet-56 for 32x32 images.
_base_ = "./digits_resnet20.py"

model = dict(backbone=dict(depth=56))
