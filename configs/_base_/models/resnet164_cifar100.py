# ResNet-164 of Hinge, 100 classes.
_base_ = "./resnet164_cifar10.py"

model = dict(head=dict(num_classes=100))
