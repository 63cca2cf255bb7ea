# ResNet-20 for 32x32 images.
_base_ = ["./digits.py", "../../_base_/models/resnet20_cifar10.py"]
model = dict(head=dict(topk=(1,)))
