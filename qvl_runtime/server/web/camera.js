// A photo from the device's camera.

/** Ask for one photo in the dialog of the page; returns a file, or null if it was canceled. Throws without a camera. */
export async function takePhoto(document) {
  const find = (id) => document.getElementById(id);
  const [dialog, video] = [find("camera-dialog"), find("video")];
  if (!navigator.mediaDevices) throw new Error("HTTPS"); // browsers lend it to safe origins only
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
  video.srcObject = stream;
  dialog.returnValue = "";
  dialog.showModal();
  try {
    const taken = await new Promise((resolve) => {
      find("shoot").onclick = () => resolve(true);
      find("camera-cancel").onclick = () => resolve(false);
      dialog.onclose = () => resolve(false);
    });
    if (!taken) return null;
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
    return new File([blob], "photo.jpg", { type: "image/jpeg" });
  } finally {
    for (const track of stream.getTracks()) track.stop();
    dialog.close();
  }
}
