# ResNet-20 for 32x32 images, of half width (8, 16, 32 channels): at full width the digits need so few channels that
# even random ones at 25 % of the MACs lose next to nothing.
_base_ = ["./digits.py", "../../_base_/models/resnet20_cifar10.py"]
model = dict(backbone=dict(width=8), head=dict(in_channels=32, topk=(1,)))
