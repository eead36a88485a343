// The camera as a source of images.

const PROBLEMS = {
  NotAllowedError: "this page may not use it; allow it in the browser's settings",
  NotFoundError: "there is none",
  NotReadableError: "another program uses it",
};

export class Camera {
  #stream = null;
  #video = document.createElement("video");

  get isOn() {
    return this.#stream !== null;
  }

  async start() {
    if (!navigator.mediaDevices) {
      throw new Error("Camera: browsers allow it only on pages with https, and on this device's own");
    }
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      this.#video.muted = true;
      this.#video.playsInline = true;
      this.#video.srcObject = this.#stream;
      await this.#video.play();
    } catch (error) {
      this.stop();
      throw new Error(`Camera: ${PROBLEMS[error.name] ?? error.message}`);
    }
  }

  /** What the camera sees now, as an ImageBitmap. */
  frame() {
    return createImageBitmap(this.#video);
  }

  stop() {
    this.#stream?.getTracks().forEach((track) => track.stop());
    this.#stream = null;
  }
}
