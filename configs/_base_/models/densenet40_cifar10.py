# DenseNet-40 with growth 12, as in Hinge.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.CIFARDenseNet", depth=40),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=456, loss=dict(type="CrossEntropyLoss")),
)
