"""SAM-HQ masks for detector boxes, over millions of images."""
