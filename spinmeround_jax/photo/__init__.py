"""From a photograph to an aligned portrait and its identity. `prepare.prepare` is the way in.

images      any image file -> pixels, or one clear error
landmarks   where the 68 (or 5) points of a face are on the mean head, and how heads differ
pose        landmarks -> how the head is turned and where it is in the photo
align       photo and pose -> the 512 x 512 crop in which models expect the head
faces       detection, landmarks and ArcFace (insightface)
background  what of the crop is the person
assets      which model files are needed, their licences, where they come from
preview     an image of all steps
prepare     the whole way for one photo; `__main__` is its command line, `fetch` gets the models

Importing `images`, `pose` or `align` needs only numpy, scipy and Pillow.
"""
