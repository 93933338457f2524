"""Small ONNX models with the inputs and outputs of the real ones, for a photo made for them.

The detector sees a face wherever a green square marks a nose; landmarks sit where the mean head has
them; the vector of a face is a random projection of its colours; green is background.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from spinmeround_jax.photo import assets, landmarks, pose
from spinmeround_jax.photo.pose import Square

FACE = 96.0  # pixels of the photo: side of the detector's box
SIDE = 240.0  # pixels: side of the canonical square of that face
WALL = (40, 160, 70)


def _initializer(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def _save(path, nodes, inputs, outputs, initializers):
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _info(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def canonical(yaw=0.0):
    """(68, 2) of the mean head, in fractions of the square."""
    return pose.project(landmarks.load_model().mean, yaw, 0.0)


def save_detector(path):
    """(1, 3, h, w) -> scores, boxes and five landmarks at strides 8, 16, 32, two anchors each."""
    five = (landmarks.FIVE_OF_68 @ canonical() - canonical()[30]) * SIDE  # from the nose
    nodes, initializers = [], []
    outputs = {"score": [], "bbox": [], "kps": []}
    for stride in (8, 16, 32):
        pool, mean = f"pool{stride}", f"mean{stride}"
        nodes.append(
            helper.make_node("AveragePool", ["x"], [mean], pool, kernel_shape=[stride] * 2,
                             strides=[stride] * 2)
        )  # fmt: skip
        # Pixels arrive as (RGB - 127.5) / 128: a pure green block has (-1, 1, -1).
        weights = {
            "score": np.tile([[-9.0, 9.0, -9.0], [0.0, 0.0, 0.0]], 1),
            "bbox": np.zeros((8, 3)),
            "kps": np.zeros((20, 3)),
        }
        biases = {
            "score": np.array([-24.0 if stride == 8 else -90.0, -90.0]),
            "bbox": np.tile(FACE / 2 / stride, 8),
            # The anchor is the block's corner, the nose its middle.
            "kps": np.tile((five + 4.0).ravel() / stride, 2),
        }
        for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
            name = f"{kind}{stride}"
            initializers += [
                _initializer(f"w_{name}", weights[kind][..., None, None].astype(np.float32)),
                _initializer(f"b_{name}", biases[kind].astype(np.float32)),
                _initializer(f"s_{name}", np.array([-1, width], np.int64)),
            ]
            nodes += [
                helper.make_node("Conv", [mean, f"w_{name}", f"b_{name}"], [f"c_{name}"]),
                helper.make_node("Transpose", [f"c_{name}"], [f"t_{name}"], perm=[0, 2, 3, 1]),
            ]
            last = f"r_{name}" if kind == "score" else name
            nodes.append(helper.make_node("Reshape", [f"t_{name}", f"s_{name}"], [last]))
            if kind == "score":
                nodes.append(helper.make_node("Sigmoid", [last], [name]))
            outputs[kind].append(_info(name, [f"n{stride}", width]))
    return _save(
        path, nodes, [_info("x", [1, 3, "h", "w"])],
        [*outputs["score"], *outputs["bbox"], *outputs["kps"]], initializers,
    )  # fmt: skip


def save_landmarks(path):
    """(1, 3, 192, 192) -> (1, 3309): 1103 points, the last 68 being the landmarks."""
    crop = 1.5 * FACE  # what insightface cuts out around the box, whose middle is the nose's corner
    flat = (canonical() - canonical()[30]) * SIDE + 4.0
    head = landmarks.load_model().mean
    points = np.zeros((1103, 3))
    points[-68:] = np.column_stack([2.0 * flat / crop, 2.0 * head[:, 2] * SIDE / 0.633 / crop])
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["m", "one"], ["r"]),
        helper.make_node("MatMul", ["r", "zero"], ["z"]),
        helper.make_node("Add", ["z", "points"], ["y"]),
    ]
    initializers = [
        _initializer("one", np.array([1, 1], np.int64)),
        _initializer("zero", np.zeros((1, 3309), np.float32)),
        _initializer("points", points.reshape(1, -1).astype(np.float32)),
    ]
    return _save(
        path, nodes, [_info("x", ["b", 3, 192, 192])], [_info("y", ["b", 3309])], initializers
    )


def save_recognition(path, size=512):
    """(b, 3, 112, 112) -> (b, size): a random projection of colours in 16 x 16 blocks."""
    projection = np.random.default_rng(5).standard_normal((3 * 16 * 16, size)) / 28
    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[7, 7], strides=[7, 7]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    return _save(
        path, nodes, [_info("x", ["b", 3, 112, 112])], [_info("y", ["b", size])],
        [_initializer("w", projection.astype(np.float32))],
    )  # fmt: skip


def save_parsing(path, classes=19):
    """(b, 3, 512, 512) -> (b, classes, 512, 512): greener than red is background."""
    weights = np.zeros((classes, 3, 1, 1), np.float32)
    weights[0, :2, 0, 0] = [-9.0, 9.0]
    bias = np.full(classes, -60.0, np.float32)
    bias[:2] = [-4.0, 4.0]
    return _save(
        path, [helper.make_node("Conv", ["input", "w", "b"], ["output"])],
        [_info("input", ["b", 3, 512, 512])], [_info("output", ["b", classes, 512, 512])],
        [_initializer("w", weights), _initializer("b", bias)],
    )  # fmt: skip


def save_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_detector(folder / assets.DETECTOR.name)
    save_landmarks(folder / assets.LANDMARKS.name)
    save_recognition(folder / assets.RECOGNITION.name)
    save_parsing(folder / assets.PARSING.name)
    return folder


def draw_photo(noses=((320, 320),), size=(640, 640), skin=(205, 150, 120)):
    """RGB photo with a face per nose (multiples of 8), and the true square of each."""
    image = Image.new("RGB", size, WALL)
    pen = ImageDraw.Draw(image)
    squares = []
    for nose in noses:
        # The nose is in the middle of its block of 8 x 8 pixels.
        middle = np.array(nose, float) + 4.0
        square = Square(middle - (canonical()[30] - 0.5) * SIDE, SIDE, 0.0)
        points = square.to_photo(canonical())
        left, top = square.to_photo(np.array([0.31, 0.23]))
        right, bottom = square.to_photo(np.array([0.69, 0.81]))
        pen.ellipse([left, top, right, bottom], fill=skin)
        shoulders = square.to_photo(np.array([[0.1, 1.3], [0.4, 0.78], [0.6, 0.78], [0.9, 1.3]]))
        pen.polygon([tuple(p) for p in shoulders], fill=(120, 40, 160))
        for chain in (points[36:42], points[42:48]):
            pen.polygon([tuple(p) for p in chain], fill=(30, 20, 60))
        pen.polygon([tuple(p) for p in points[48:60]], fill=(190, 40, 60))
        x, y = nose
        pen.rectangle([x, y, x + 7, y + 7], fill=(0, 255, 0))
        squares.append(square)
    return image, squares
