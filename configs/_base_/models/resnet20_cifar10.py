# ResNet-20 with 1x1 convolution and batch norm as projections.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.CIFARResNet", depth=20),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=64, loss=dict(type="CrossEntropyLoss")),
)
