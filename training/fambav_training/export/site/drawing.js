// Which patches are one token, drawn over the image.

const LINE_COLOR = "#ff7f0e";
const MARK_COLOR = "#1a73e8";

/** The patches of every token: token -> [patch, ...]. */
export function patchesOfTokens(tokens) {
  const groups = new Map();
  tokens.forEach((token, patch) => {
    if (!groups.has(token)) {
      groups.set(token, []);
    }
    groups.get(token).push(patch);
  });
  return groups;
}

/** Average colour of some patches of (height, width, 4) bytes. */
function averageColor(pixels, width, height, [rows, columns], patches) {
  const sum = [0, 0, 0];
  let count = 0;
  for (const patch of patches) {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    for (let y = Math.floor((row * height) / rows); y < Math.floor(((row + 1) * height) / rows); y++) {
      for (let x = Math.floor((column * width) / columns); x < Math.floor(((column + 1) * width) / columns); x++) {
        const place = 4 * (y * width + x);
        sum.forEach((_, channel) => (sum[channel] += pixels[place + channel]));
        count++;
      }
    }
  }
  return `rgb(${sum.map((value) => Math.round(value / count)).join(" ")})`;
}

/** Outline some patches: only those sides behind which is another token. */
function outline(context, tokens, [rows, columns], patches, color, lineWidth) {
  const [width, height] = [context.canvas.width / columns, context.canvas.height / rows];
  context.strokeStyle = color;
  context.lineWidth = lineWidth;
  context.beginPath();
  for (const patch of patches) {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const [left, top, right, bottom] = [column * width, row * height, (column + 1) * width, (row + 1) * height];
    const isOther = (y, x) => tokens[y * columns + x] !== tokens[patch] || y < 0 || x < 0 || y >= rows || x >= columns;
    const sides = [
      [isOther(row - 1, column), left, top, right, top],
      [isOther(row + 1, column), left, bottom, right, bottom],
      [isOther(row, column - 1), left, top, left, bottom],
      [isOther(row, column + 1), right, top, right, bottom],
    ];
    for (const [isDrawn, x0, y0, x1, y1] of sides) {
      if (isDrawn) {
        context.moveTo(x0, y0);
        context.lineTo(x1, y1);
      }
    }
  }
  context.stroke();
}

/**
 * Draw an image with its tokens.
 *
 * @param canvas has the size of the drawing.
 * @param image what the canvas can draw, at any size.
 * @param tokens the token of every patch, row by row; null draws the image alone.
 * @param grid rows and columns of patches.
 * @param marked a patch whose token is marked, or null.
 */
export function drawTokens(canvas, image, tokens, grid, marked) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas;
  context.imageSmoothingEnabled = image.width > width;
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0, width, height);
  if (tokens === null) {
    return;
  }
  const { data } = context.getImageData(0, 0, width, height);
  const groups = patchesOfTokens(tokens);
  const lineWidth = Math.max(2, width / 240);
  const [rows, columns] = grid;
  for (const patches of groups.values()) {
    if (patches.length > 1) {
      context.fillStyle = averageColor(data, width, height, grid, patches);
      for (const patch of patches) {
        const [row, column] = [Math.floor(patch / columns), patch % columns];
        const [left, top] = [Math.floor((column * width) / columns), Math.floor((row * height) / rows)];
        const [right, bottom] = [((column + 1) * width) / columns, ((row + 1) * height) / rows];
        context.fillRect(left, top, Math.ceil(right) - left, Math.ceil(bottom) - top);
      }
    }
  }
  for (const patches of groups.values()) {
    if (patches.length > 1) {
      outline(context, tokens, grid, patches, LINE_COLOR, lineWidth);
    }
  }
  if (marked !== null) {
    outline(context, tokens, grid, groups.get(tokens[marked]), MARK_COLOR, 3 * lineWidth);
  }
}
