# PreResNet-164 of gumi, 100 classes.
_base_ = "./preresnet164_cifar10.py"

model = dict(head=dict(num_classes=100))
