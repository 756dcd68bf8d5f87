"""The Inception network of FID: torch-fidelity's port of the TensorFlow graph of 2015-12-05, without weights."""

from __future__ import annotations

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as port
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class InceptionNetwork(port.FeatureExtractorInceptionV3):
    """torch-fidelity's network without its constructor, which downloads weights or unpickles them unchecked."""

    def __init__(self) -> None:
        FeatureExtractorBase.__init__(self, "inception", ["2048"])
        self.feature_extractor_internal_dtype = torch.float32
        convolution = port.BasicConv2d
        self.Conv2d_1a_3x3 = convolution(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = convolution(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = convolution(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = convolution(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = convolution(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = port.InceptionA(192, pool_features=32)
        self.Mixed_5c = port.InceptionA(256, pool_features=64)
        self.Mixed_5d = port.InceptionA(288, pool_features=64)
        self.Mixed_6a = port.InceptionB(288)
        self.Mixed_6b = port.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = port.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = port.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = port.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = port.InceptionD(768)
        self.Mixed_7b = port.InceptionE_1(1280)
        self.Mixed_7c = port.InceptionE_2(2048)
        self.AvgPool = nn.AdaptiveAvgPool2d(output_size=(1, 1))
        self.fc = nn.Linear(2048, 1008)
